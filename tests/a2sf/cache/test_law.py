"""The block law on tensors equals the law written out token by token."""

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf.cache import attention, scoring
from a2sf.cache.passes import BlockPass, end_prompt
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.scoring import EMPTY
from a2sf.cache.slots import Slots
from a2sf.engine import decoding
from a2sf.engine.decoding import Backend
from a2sf.policy import EffectivePolicy, Heads
from tests.head_slots import head_of
from tests.written_out import Head

CPU = torch.device("cpu")

CLOSE = {
    torch.float64: {"rtol": 1e-7, "atol": 1e-7},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
}


def test_scores_of_the_worked_example_are_82_and_44() -> None:
    # The paper's figure: S11 = .4, S12 = .3, S21 = .5, S22 = .2 at alpha = .8.
    alpha = torch.tensor([[[0.8]]], dtype=torch.float64)
    one = torch.tensor([1])
    score = torch.zeros(1, 1, 1, 2)
    for row in ([0.4, 0.3], [0.5, 0.2]):
        scoring.accumulate(score, scoring.decay(alpha, one), torch.tensor([row]))
    assert score[0, 0, 0].tolist() == pytest.approx([0.82, 0.44])

    weights = scoring.query_weights(alpha, torch.tensor([2]), 0, 2)
    at_once = weights[0, 0] @ torch.tensor([[0.4, 0.3], [0.5, 0.2]])
    assert at_once[0].tolist() == pytest.approx([0.82, 0.44])


@pytest.mark.parametrize(
    ("alpha", "window"), [(0.0, 1), (0.9, 132), (0.95, 270), (0.99, 1375), (0.999, 13809)]
)
def test_the_window_of_queries_has_the_documented_size(alpha: float, window: int) -> None:
    weights = scoring.query_weights(
        torch.tensor([[[alpha]]], dtype=torch.float64), torch.tensor([15000]), 0, 15000
    )
    assert int((weights > 0).sum()) == window
    assert weights[0, 0, 0, -1] == 1.0


def test_the_oldest_token_loses_a_tie() -> None:
    position = torch.tensor([[[[7, 3, 5, EMPTY]]]], dtype=torch.int32)
    score = torch.tensor([[[[0.25, 0.25, 0.5, 0.0]]]])
    none = torch.tensor([0])
    allowed = scoring.evictable(position, torch.tensor([8]), none, none[None, None])
    key = scoring.eviction_key(score, position, allowed)
    assert key.argsort(dim=-1)[0, 0, 0].tolist()[:3] == [1, 0, 2]
    assert not allowed[0, 0, 0, 3]


def test_random_scores_are_uniform_and_depend_on_every_input() -> None:
    position = torch.arange(4000).expand(2, -1)
    first = scoring.first_heads(torch.tensor([2, 3]))
    scores = scoring.random_scores(torch.tensor([0, 1]), first, 3, position)
    flat = scores.reshape(12, -1)
    assert scores.min() >= 0
    assert scores.max() < 1
    correlation = np.corrcoef(flat.numpy())
    assert abs(correlation - np.eye(12)).max() < 0.1
    for row in flat:
        histogram = torch.histc(row, bins=10, min=0, max=1)
        assert histogram.min() > 300
        assert histogram.max() < 500


def of_heads(kv_heads: int, number: st.SearchStrategy[int]) -> st.SearchStrategy[Heads]:
    """One number per head in each of two layers."""
    return st.tuples(*[st.tuples(*[number] * kv_heads)] * 2)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    rows = draw(st.integers(1, 3))
    kv_heads = draw(st.integers(1, 2))
    policies = []
    for _ in range(rows):
        sinks = draw(st.integers(0, 3))
        # One number per head in each of two layers; a sequence has at most 22 tokens.
        recents = draw(of_heads(kv_heads, st.integers(0, 4)))
        spare = draw(of_heads(kv_heads, st.integers(0, 20)))
        budgets = tuple(
            tuple(sinks + recent + 1 + more for recent, more in zip(*layer, strict=True))
            for layer in zip(recents, spare, strict=True)
        )
        policies.append(
            {
                "sinks": sinks,
                "recents": recents,
                "budgets": budgets,
                "alpha": [
                    draw(st.sampled_from([0.0, 0.5, 0.83, 0.99, 1.0])) for _ in range(kv_heads)
                ],
                "random_seed": draw(st.sampled_from([None, None, None, 5])),
                "prompt": draw(st.integers(1, 14)),
            }
        )
    return {
        "policies": policies,
        "kv_heads": kv_heads,
        "group": draw(st.integers(1, 3)),
        "chunk": draw(st.sampled_from([0, 1, 2, 3, 5, 8])),
        "piece": draw(st.sampled_from([1, 2, 3, 20])),
        "steps": draw(st.integers(0, 8)),
        "seed": draw(st.integers(0, 10**6)),
    }


@settings(max_examples=150)
@given(cases())
def test_blocks_and_decode_steps_equal_the_written_out_law(case: dict) -> None:
    hold_to_the_law("torch", case)


@settings(max_examples=100)
@given(cases())
def test_compiled_decode_steps_equal_the_written_out_law(case: dict) -> None:
    hold_to_the_law("numba", case)


def hold_to_the_law(backend: Backend, case: dict) -> None:
    dim, scale = 4, 0.7
    dtype = torch.float64 if backend == "torch" else torch.float32
    policies, kv_heads, group = case["policies"], case["kv_heads"], case["group"]
    rows, steps = len(policies), case["steps"]
    rng = torch.Generator().manual_seed(case["seed"])
    length = max(p["prompt"] for p in policies) + steps

    def normal(heads: int) -> torch.Tensor:
        drawn = torch.randn(2, rows, heads, length, dim, generator=rng, dtype=torch.float64)
        return drawn.to(dtype)

    query, keys, values = normal(kv_heads * group), normal(kv_heads), normal(kv_heads)

    # Written out, head by head. The first of two layers has one alpha for all heads.
    witness = {}
    for layer, row, head in itertools.product(range(2), range(rows), range(kv_heads)):
        policy = policies[row]
        seed = policy["random_seed"]
        hashes = (
            None
            if seed is None
            else scoring.random_scores(
                torch.tensor([seed]),
                scoring.first_heads(torch.tensor([layer])),
                kv_heads,
                torch.arange(length)[None],
            )[0, 0, head].tolist()
        )
        state = Head(
            alpha=policy["alpha"][head] if layer else 0.5,
            budget=policy["budgets"][layer][head],
            recent=policy["recents"][layer][head],
            sinks=policy["sinks"],
            random_score=hashes and hashes.__getitem__,
        )
        members = slice(head * group, (head + 1) * group)
        q = query[layer, row, members].transpose(0, 1).tolist()
        k, v = keys[layer, row, head].tolist(), values[layer, row, head].tolist()
        n = policy["prompt"]
        out = state.prompt(q[:n], k[:n], v[:n], scale, case["chunk"])
        for t in range(n, n + steps):
            out += state.block(t, q[t : t + 1], k[t : t + 1], v[t : t + 1], scale)
        witness[layer, row, head] = (state, out)

    # On tensors: all rows together, ragged, blocks in pieces.
    effective = [
        EffectivePolicy(
            method="table" if p["random_seed"] is None else "random",
            # Scores of the random baseline do not decay.
            alpha=((0.5,) * kv_heads, tuple(p["alpha"]))
            if p["random_seed"] is None
            else ((1.0,) * kv_heads,) * 2,
            # The law uses each head's own numbers; the mean budget has no effect.
            budget=1,
            head_budgets=p["budgets"],
            recent=0,
            head_recents=p["recents"],
            sinks=p["sinks"],
            prefill_chunk=case["chunk"],
            random_seed=p["random_seed"],
        )
        for p in policies
    ]
    stacked = PolicyTensors.stack(effective, [length + 100] * rows, CPU)
    prompt = torch.tensor([p["prompt"] for p in policies])
    longest = int(prompt.max())
    chunk = case["chunk"] or longest
    budgets = stacked.budget.amax(dim=1).tolist()

    def empty(slots: Sequence[Sequence[int]]) -> Slots:
        return Slots.empty(
            rows=rows,
            slots=tuple(map(tuple, slots)),
            head_dim=dim,
            dtype=dtype,
            device=CPU,
        )

    room = max(map(max, budgets)) + 2 * chunk
    staging, slots = empty([[room] * kv_heads] * 2), empty(budgets)
    output = torch.zeros_like(query)
    used = torch.zeros(2, rows, kv_heads, dtype=torch.int64)
    for start in range(0, longest, chunk):
        end = min(start + chunk, longest)
        for first in range(start, end, case["piece"]):
            tile = slice(first, min(first + case["piece"], end))
            block = BlockPass(
                staging,
                stacked,
                start=torch.full((rows,), start),
                lengths=(prompt - start).clamp(0, chunk),
                used=used,
                width=tile.stop - first,
                first=first - start,
            )
            for layer in range(2):
                qkv = (t[layer, :, :, tile] for t in (query, keys, values))
                output[layer, :, :, tile] = block(layer, *qkv, scale)
            used = block.used_after
    used = end_prompt(staging, used, prompt, stacked)
    for row, counts in enumerate(used.transpose(0, 1).tolist()):
        slots.copy_row(row, staging, row, counts)
    begin = decoding.make_steps(backend, slots, stacked)
    for ahead in range(steps):
        at = (prompt + ahead)[:, None, None, None]
        step = begin(prompt + ahead)
        for layer in range(2):
            token = [
                t[layer].gather(2, at.expand(-1, t.shape[2], 1, dim)) for t in (query, keys, values)
            ]
            answer = step(layer, *token, scale)
            output[layer].scatter_(2, at.expand_as(answer), answer)

    for (layer, row, head), (state, out) in witness.items():
        real = policies[row]["prompt"] + steps
        mine = output[layer, row, head * group : (head + 1) * group, :real].transpose(0, 1)
        torch.testing.assert_close(mine, torch.tensor(out, dtype=dtype), **CLOSE[dtype])
        stored = head_of(slots, layer, row, head).stored()
        assert stored.keys() == {t.position for t in state.tokens}
        for token in state.tokens:
            assert stored[token.position] == pytest.approx(token.score, rel=1e-5, abs=1e-7)


def test_a_long_block_in_tiles_equals_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(random.Random(0).randrange(2**31))
    query = torch.randn(2, 4, 50, 8, generator=rng, dtype=torch.float64)
    keys = torch.randn(2, 2, 50, 8, generator=rng, dtype=torch.float64)
    position = torch.arange(50, dtype=torch.int32).expand(2, 2, -1).contiguous()
    weights = torch.rand(2, 2, 50, generator=rng)
    at = torch.arange(50).expand(2, -1)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            attention.attend(query, at, keys, keys, position, 0.3),
            attention.attention_sum(query, at, keys, position, weights, 0.3),
        )

    monkeypatch.setattr(attention, "SCORE_TILE", 50)
    whole = both()
    monkeypatch.setattr(attention, "QUERY_TILE", 7)
    monkeypatch.setattr(attention, "SCORE_TILE", 9)
    for one, other in zip(whole, both(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("policy", "length", "scored"),
    [
        ({"method": "a2sf", "alpha": 0.5}, 400, 20),  # .5^19 is the last weight above 1e-6
        ({"method": "tova_per_head", "alpha": 0.0}, 400, 1),
        ({"method": "h2o", "alpha": 1.0}, 400, 300),
        ({"method": "h2o", "alpha": 1.0}, 40, 0),  # all of it fits
        ({"method": "window", "alpha": 1.0}, 400, 0),
        ({"method": "random", "alpha": 1.0, "random_seed": 3}, 400, 0),
    ],
)
@pytest.mark.parametrize("piece", [300, 64])
def test_only_queries_with_a_weight_are_scored(
    monkeypatch: pytest.MonkeyPatch, policy: dict, length: int, scored: int, piece: int
) -> None:
    fields = policy | {"alpha": ((policy["alpha"],) * 2,)}
    requested_policy = EffectivePolicy(
        budget=50,
        head_budgets=((50, 50),),
        recent=0,
        head_recents=((0, 0),),
        sinks=0,
        prefill_chunk=0,
        **fields,
    )
    stacked = PolicyTensors.stack([requested_policy], [length], CPU)
    slots = Slots.empty(
        rows=1,
        slots=((300, 300),),
        head_dim=4,
        dtype=torch.float64,
        device=CPU,
    )
    widths = []
    attention_sum = attention.attention_sum
    monkeypatch.setattr(
        attention,
        "attention_sum",
        lambda q, *rest: widths.append(q.shape[2]) or attention_sum(q, *rest),
    )
    used = torch.tensor([[[0, 0]]])
    for first in range(0, 300, piece):
        width = min(piece, 300 - first)
        step = BlockPass(
            slots,
            stacked,
            start=torch.tensor([0]),
            lengths=torch.tensor([300]),
            used=used,
            width=width,
            first=first,
        )
        query, keys = torch.randn(2, 1, 2, width, 4, dtype=torch.float64)
        step(0, query, keys, keys, 0.5)
        used = step.used_after
    assert sum(widths) == scored
