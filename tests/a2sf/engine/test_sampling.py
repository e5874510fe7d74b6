"""A draw follows the filtered distribution, and depends only on its own row and seed."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from a2sf.engine import rng, sampling
from a2sf.requests import Sampling
from tests.sampling_cases import (
    CPU,
    VOCAB,
    greedy_settings,
    ids,
    probabilities,
    random_logits,
    requested_settings,
    row,
)


def draw_and_note(
    batch: sampling.Batch, rows: list[sampling.SamplingState], logits: Tensor
) -> list[int | None]:
    drawn = batch.draw(logits)
    for one, token in zip(rows, drawn, strict=True):
        if token is not None:
            one.note(token)
    return drawn


def draw(logits: Tensor, one: sampling.SamplingState) -> int | None:
    return draw_and_note(sampling.Batch([one], CPU), [one], logits[None])[0]


def one_row_written_out(logits: Tensor, requested: Sampling, seed: int, draws: int) -> int:
    """The draw of one row, written out filter by filter."""
    if requested.temperature == 0.0:
        return int(logits.argmax())
    scaled = logits.float() / requested.temperature
    if 0 < requested.top_k < len(scaled):
        least = scaled.topk(requested.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if requested.top_p < 1.0:
        descending, order = scaled.softmax(dim=-1).sort(descending=True, stable=True)
        before = descending.cumsum(dim=-1) - descending
        scaled[order[before >= requested.top_p]] = -torch.inf
    if requested.min_p > 0.0:
        shares = scaled.softmax(dim=-1)
        scaled = scaled.masked_fill(shares < requested.min_p * shares.max(), -torch.inf)
    race = rng.exponential([(seed, draws)], len(scaled), CPU)[0]
    return int((scaled.softmax(dim=-1) / race).argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 257, 5000])
def test_batched_draws_equal_a_row_drawn_filter_by_filter(vocab: int, dtype: torch.dtype) -> None:
    made = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (0.0, 0.7, 1.3)
        for top_k in (0, 1, 50)
        for top_p in (0.4, 0.9, 1.0)
        for min_p in (0.0, 0.05)
    ]
    rows = [row(requested, seed=i, vocab_size=vocab) for i, requested in enumerate(made)]
    batch = sampling.Batch(rows, CPU)
    for step in range(6):
        logits = random_logits(len(made), vocab, seed=step).to(dtype)
        assert draw_and_note(batch, rows, logits) == [
            one_row_written_out(logits[i], requested, i, step) for i, requested in enumerate(made)
        ]


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(requested_settings | greedy_settings, ids, ids), min_size=2, max_size=7),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([VOCAB, 1000]),
)
def test_a_row_draws_the_same_token_in_any_batch(
    seed: int,
    cases: list[tuple[Sampling, list[int], list[int]]],
    dtype: torch.dtype,
    vocab: int,
) -> None:
    def start(index: int) -> sampling.SamplingState:
        requested, prompt, banned_tokens = cases[index]
        return row(
            requested,
            prompt,
            seed=index,
            vocab_size=vocab,
            banned_tokens=banned_tokens,
            banned_draws=2,
        )

    steps = [random_logits(len(cases), vocab, seed=seed + i).to(dtype) for i in range(5)]
    rows = [start(i) for i in range(len(cases))]
    batch = sampling.Batch(rows, CPU)
    together = [draw_and_note(batch, rows, logits) for logits in steps]
    for index in range(len(cases)):
        alone = start(index)
        tokens = [draw(logits[index], alone) for logits in steps]
        assert tokens == [step[index] for step in together]


@pytest.mark.parametrize(
    "requested",
    [
        Sampling(),
        Sampling(temperature=0.9, top_k=4),
        Sampling(temperature=1.5, top_p=0.9),
        Sampling(temperature=2.0, min_p=0.2),
    ],
)
def test_draws_follow_the_distribution(requested: Sampling) -> None:
    logits = torch.tensor([0.1, 2.0, -1.0, 1.0, 0.5, -0.5])
    count = 4000
    want = probabilities(logits, requested)
    one = row(requested, seed=1, vocab_size=6)
    in_time = torch.tensor([draw(logits, one) or 0 for _ in range(count)])
    rows = [row(requested, seed=seed, vocab_size=6) for seed in range(count)]
    across = torch.tensor(sampling.Batch(rows, CPU).draw(logits.expand(count, -1)))
    for drawn in (in_time, across):
        seen = drawn.bincount(minlength=6)
        assert int(seen[want == 0].sum()) == 0
        kept = want > 0
        expected = want[kept].double() * count
        assert chisquare(seen[kept], expected * count / expected.sum()).pvalue > 0.001


def test_equal_seeds_repeat_draws_and_other_seeds_do_not() -> None:
    logits = torch.zeros(50)

    def draws(seed: int) -> list[int | None]:
        one = row(Sampling(), seed=seed, vocab_size=50)
        return [draw(logits, one) for _ in range(20)]

    assert draws(3) == draws(3) != draws(4)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-40])
def test_greedy_draws_the_most_likely_token_with_the_lowest_id(temperature: float) -> None:
    requested = Sampling(temperature=temperature)
    # Also together with a row that is not greedy.
    rows = [row(requested, vocab_size=3), row(Sampling(), vocab_size=3)]
    logits = torch.tensor([[0.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    assert sampling.Batch(rows, CPU).draw(logits)[0] == 1
    assert draw(logits[0], row(requested, vocab_size=3)) == 1


def test_a_drawn_token_is_penalised_in_later_draws() -> None:
    one = row(Sampling(temperature=0.0, repetition_penalty=2.0), [3], vocab_size=4)
    batch = sampling.Batch([one], CPU)
    logits = torch.tensor([[2.0, 3.0, 2.5, 4.0]])
    # 3 was in the prompt, so its logit is halved. A drawn token's logit is halved too, only once.
    assert [draw_and_note(batch, [one], logits)[0] for _ in range(5)] == [1, 2, 0, 3, 3]
    assert logits.tolist() == [[2.0, 3.0, 2.5, 4.0]]


def test_tokens_are_banned_for_exactly_the_given_draws() -> None:
    one = row(Sampling(temperature=0.0), vocab_size=3, banned_tokens=(2, 0), banned_draws=2)
    logits = torch.tensor([1.0, 0.0, 2.0])
    assert [draw(logits, one) for _ in range(3)] == [1, 1, 2]
    always = [
        draw(logits, row(Sampling(), seed=s, vocab_size=3, banned_tokens=(2, 0), banned_draws=1))
        for s in range(30)
    ]
    assert set(always) == {1}


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    st.integers(0, 20),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@example([1] * 30, 20, torch.float32)
def test_logprobs_are_those_of_the_raw_logits_with_ties_by_id(
    values: list[int], top: int, dtype: torch.dtype
) -> None:
    logits = torch.tensor([values, values[::-1]], dtype=dtype)
    found = sampling.logprobs(logits, [0, len(values) - 1], [top, 0])
    want = torch.tensor(values, dtype=torch.float64).log_softmax(-1).tolist()
    assert [one.logprob for one in found] == pytest.approx([want[0]] * 2, abs=1e-6)
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top]
    assert [one.token_id for one in found[0].top] == ranked
    assert [one.logprob for one in found[0].top] == pytest.approx(
        [want[i] for i in ranked], abs=1e-6
    )
    assert found[1].top == ()


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_a_given_seed_is_used(seed: int) -> None:
    assert sampling.choose_seed(Sampling(seed=seed)) == seed


FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {},
    {"repetition_penalty": 1.5},
    {"top_k": 4},
    {"top_p": 0.5},
    {"min_p": 0.3},
    {"top_k": 4, "top_p": 0.5, "min_p": 0.3},
]


NOT_FINITE = pytest.mark.parametrize("value", [torch.nan, torch.inf])


@NOT_FINITE
@pytest.mark.parametrize("places", [[7], list(range(VOCAB))], ids=["one", "all"])
@pytest.mark.parametrize("banned_tokens", [(), (7, 9)], ids=["free", "banned_tokens"])
@pytest.mark.parametrize("requested", FILTERS, ids=str)
def test_no_token_is_drawn_from_logits_that_are_not_finite(
    requested: dict[str, Any], banned_tokens: tuple[int, ...], places: list[int], value: float
) -> None:
    """Even if a filter or a ban removes exactly the values that are not finite."""
    logits = random_logits(1)
    logits[0, places] = value
    one = row(Sampling(**requested), banned_tokens=banned_tokens, banned_draws=1)
    assert sampling.Batch([one], CPU).draw(logits) == [None]


@NOT_FINITE
def test_a_row_with_nan_does_not_change_other_rows_draws(value: float) -> None:
    requested_settings = [Sampling(**requested) for requested in FILTERS]
    logits = random_logits(2 * len(requested_settings), seed=3)
    spoiled = logits.clone()
    spoiled[1::2] = value
    rows = [
        row(requested, seed=i) for i, requested in enumerate(requested_settings) for _ in range(2)
    ]
    want = sampling.Batch(rows, CPU).draw(logits)
    got = sampling.Batch(rows, CPU).draw(spoiled)
    assert got[::2] == want[::2]
    assert got[1::2] == [None] * len(requested_settings)


@pytest.mark.parametrize("requested", FILTERS, ids=str)
def test_tokens_at_minus_infinity_are_never_drawn(requested: dict[str, Any]) -> None:
    logits = random_logits(1)
    logits[0, 5:] = -torch.inf
    one = row(Sampling(**requested), banned_tokens=(3, 8), banned_draws=1)
    (token,) = sampling.Batch([one], CPU).draw(logits)
    assert token in {0, 1, 2, 4}


def test_no_token_is_drawn_if_all_are_at_minus_infinity() -> None:
    logits = torch.full((2, VOCAB), -torch.inf)
    rows = [row(Sampling(temperature=temperature)) for temperature in (0.0, 1.0)]
    assert sampling.Batch(rows, CPU).draw(logits) == [None, None]
