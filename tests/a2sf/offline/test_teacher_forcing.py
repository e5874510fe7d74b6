"""Partial passes: heads that evict alone, from their layer upward."""

import random

import pytest
import torch
from torch import Tensor

from a2sf.engine import decoding
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.policy import CachePolicy, EffectivePolicy
from tuner.evaluation.objective import effective

LENGTH = 40


@pytest.fixture
def examples() -> list[Example]:
    rng = random.Random(4)
    return [
        Example(tuple(rng.randrange(256) for _ in range(LENGTH)), 10, tuple(range(10, LENGTH - 1)))
        for _ in range(2)
    ]


def alone(model: LoadedModel, layer: int, head: int) -> EffectivePolicy:
    """One head keeps eight tokens by score; all others keep everything."""
    policy = effective(CachePolicy(alpha=0.9, budget=LENGTH, recent=2, sinks=1), model, LENGTH)
    budgets = [list(row) for row in policy.head_budgets]
    budgets[layer][head] = 8
    return policy.model_copy(update={"head_budgets": tuple(map(tuple, budgets))})


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows in each layer that was scanned."""
    rows: list[int] = []
    honest = decoding.walk_texts

    def noting(backend: decoding.Backend, slots: object, *rest: object, **named: object) -> None:
        rows.append(len(named["start"]))  # type: ignore[arg-type]
        honest(backend, slots, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(decoding, "walk_texts", noting)
    return rows


def logits(found: list[teacher_forcing.Prediction]) -> Tensor:
    return torch.stack([one.logits for one in found])


def test_heads_that_evict_alone_share_one_pass_from_their_layer_on(
    tiny_model_64: LoadedModel, examples: list[Example], walked: list[int]
) -> None:
    shape = tiny_model_64.shape
    full = logits(teacher_forcing.predict(tiny_model_64, examples, None))
    known = teacher_forcing.read_prompts(tiny_model_64, examples)
    below = None
    for layer in range(shape.num_layers):
        below = teacher_forcing.compute_layer_input(
            tiny_model_64, examples, None, layer, layer_input=below, prompts=known
        )
        heads = range(shape.num_kv_heads)
        rows = [index for _ in heads for index in range(len(examples))]
        policies = [alone(tiny_model_64, layer, head) for head in heads for _ in examples]
        walked.clear()
        together = teacher_forcing.predict(
            tiny_model_64,
            [examples[i] for i in rows],
            policies,
            layer_input=teacher_forcing.LayerInput(layer, tuple(below.hidden[i] for i in rows)),
            prompts=[known[i] for i in rows],
        )
        assert walked == [len(rows)], "only one layer is scanned"
        for head in heads:
            part = together[head * len(examples) : (head + 1) * len(examples)]
            whole = teacher_forcing.predict(
                tiny_model_64, examples, [alone(tiny_model_64, layer, head)] * len(examples)
            )
            torch.testing.assert_close(logits(part), logits(whole), rtol=1e-11, atol=1e-11)
            assert not torch.allclose(logits(part), full, atol=1e-3), "the head evicts"


def test_layers_without_evictions_equal_the_law(
    tiny_model_64: LoadedModel, examples: list[Example], walked: list[int]
) -> None:
    policy = alone(tiny_model_64, 1, 0)
    plain = teacher_forcing.predict(tiny_model_64, examples, [policy] * 2)
    assert walked == [2]
    # With similarity, the law runs in every layer.
    lawful = teacher_forcing.predict(tiny_model_64, examples, [policy] * 2, similarity=True)
    assert walked == [2] * 4
    torch.testing.assert_close(logits(plain), logits(lawful), rtol=1e-11, atol=1e-11)
    kept = lawful[0].similarity
    assert kept is not None
    evicting = torch.zeros_like(kept, dtype=torch.bool)
    evicting[1, 0] = True
    assert (kept[evicting] < 0.999).all()
    torch.testing.assert_close(kept[~evicting], torch.ones_like(kept[~evicting]))


def test_a_head_with_fewer_slots_than_the_mean_is_scored(
    tiny_model: LoadedModel, examples: list[Example]
) -> None:
    """The mean budget is the whole text, but one head evicts by its attention."""
    by_alpha = [
        alone(tiny_model, 1, 0).model_copy(update={"alpha": ((alpha,) * 2,) * 3})
        for alpha in (0.0, 1.0)
    ]
    first, second = (
        logits(teacher_forcing.predict(tiny_model, examples, [policy] * 2)) for policy in by_alpha
    )
    assert not torch.allclose(first, second, atol=1e-3)
