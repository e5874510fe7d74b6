"""The similarity of attention rows equals a computation with rows written out one by one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from a2sf.cache.budgets import resolve
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.policy import CachePolicy, EffectivePolicy
from tests.written_out import Head

TEXT = tuple(torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist())
PROMPT = 17


def settle(model: LoadedModel, **requested_policy: Any) -> EffectivePolicy:
    return resolve(
        CachePolicy(**requested_policy),
        table=None,
        server=CachePolicy(),
        length=len(TEXT),
        slots=64,
        num_layers=model.shape.num_layers,
        num_kv_heads=model.shape.num_kv_heads,
    )


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    exps = [math.exp(x - top) for x in logits]
    return [e / sum(exps) for e in exps]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def written_out(
    model: LoadedModel, policy: EffectivePolicy, counted: set[int]
) -> list[list[float]]:
    """[layers][H_kv]: mean cosine over counted queries and the query heads of a group."""
    found: list[list[float]] = []

    def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        output = torch.zeros_like(query)
        group = query.shape[1] // keys.shape[1]
        means = []
        for kv_head in range(keys.shape[1]):
            budget = policy.head_budgets[layer][kv_head]
            recent = policy.head_recents[layer][kv_head]
            head = Head(policy.alpha[layer][kv_head], budget, recent, policy.sinks)
            mine = query[0, kv_head * group : (kv_head + 1) * group]
            k, v = keys[0, kv_head].tolist(), values[0, kv_head].tolist()
            chunk = policy.prefill_chunk or PROMPT
            starts = [*range(0, PROMPT, chunk), *range(PROMPT, len(TEXT))]
            cosines = []
            for start in starts:
                if start == PROMPT:
                    head.trim(PROMPT, budget)
                end = min(start + chunk, PROMPT) if start < PROMPT else start + 1
                queries = [mine[:, t].tolist() for t in range(start, end)]
                outputs = head.block(start, queries, k[start:end], v[start:end], scale)
                for t, answer in zip(range(start, end), outputs, strict=True):
                    first = kv_head * group
                    output[0, first : first + group, t] = torch.tensor(answer, dtype=query.dtype)
                    if t not in counted:
                        continue
                    kept = [token.position for token in head.tokens if token.position <= t]
                    for q in mine[:, t].tolist():
                        logits = [scale * sum(map(float.__mul__, q, k[s])) for s in range(t + 1)]
                        weights = softmax([logits[s] for s in kept])
                        row = [0.0] * (t + 1)
                        for s, p in zip(kept, weights, strict=True):
                            row[s] = p
                        cosines.append(cosine(row, softmax(logits)))
            means.append(sum(cosines) / len(cosines))
        found.append(means)
        return output

    model.hidden_states(torch.tensor([TEXT]), torch.arange(len(TEXT))[None], attend)
    return found


@pytest.mark.parametrize(
    "requested_policy",
    [
        {"alpha": 0.9, "budget": 10, "recent": 3, "sinks": 1},
        {"alpha": 0.5, "budget": 12, "prefill_chunk": 1},
        {"alpha": 1.0, "budget": 9, "recent": 2, "prefill_chunk": 5},
        {"preset": "window", "budget": 8},
        {"preset": "tova_per_head", "budget": 11},
    ],
)
def test_it_is_the_cosine_of_the_retained_row_and_the_full_row(
    tiny_model_64: LoadedModel, requested_policy: dict[str, Any]
) -> None:
    counted = (3, 15, *range(20, 39, 2))
    policy = settle(tiny_model_64, **requested_policy)
    other = settle(tiny_model_64, preset="h2o", budget=20, prefill_chunk=policy.prefill_chunk)
    example = Example(TEXT, PROMPT, counted)
    # Rows of other lengths and policies in the batch must have no effect.
    beside = [Example(TEXT[:30], 29, (5, 28)), Example(TEXT + TEXT[:8], 4, (9,))]
    mine, *_ = teacher_forcing.predict(
        tiny_model_64, [example, *beside], [policy, other, other], similarity=True
    )
    assert mine.similarity is not None
    want = torch.tensor(written_out(tiny_model_64, policy, set(counted)))
    torch.testing.assert_close(mine.similarity, want, rtol=1e-4, atol=1e-5)
    assert 0.1 < float(want.min()) < 0.99


def test_similarity_is_1_without_evictions(tiny_model: LoadedModel) -> None:
    example = Example(TEXT, PROMPT, tuple(range(39)))
    for requested_policy in ({"preset": "full"}, {"alpha": 0.5, "budget": 64, "prefill_chunk": 3}):
        (found,) = teacher_forcing.predict(
            tiny_model, [example], [settle(tiny_model, **requested_policy)], similarity=True
        )
        assert found.similarity is not None
        torch.testing.assert_close(found.similarity, torch.ones(3, 2))
