"""The filters of sampling equal those of transformers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from a2sf.engine import sampling
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


def transformers_scores(
    logits: Tensor, requested: Sampling, prompt_ids: list[int], banned_tokens: list[int]
) -> Tensor:
    """The result of transformers' filters for one row, in the order of its `generate`."""
    chain = LogitsProcessorList()
    if requested.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(requested.repetition_penalty))
    if banned_tokens:
        chain.append(MinNewTokensLengthLogitsProcessor(len(prompt_ids), 1, banned_tokens))
    if requested.temperature > 0:
        chain.append(TemperatureLogitsWarper(requested.temperature))
        if requested.top_k:
            chain.append(TopKLogitsWarper(requested.top_k))
        if requested.top_p < 1:
            chain.append(TopPLogitsWarper(requested.top_p))
        if requested.min_p > 0:
            chain.append(MinPLogitsWarper(requested.min_p))
    scores: Tensor = chain(torch.tensor([prompt_ids]), logits[None].clone())
    return scores[0]


@settings(max_examples=300)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(requested_settings, ids, st.just([]) | ids), min_size=1, max_size=4),
)
def test_the_distribution_equals_transformers_row_by_row(
    seed: int, cases: list[tuple[Sampling, list[int], list[int]]]
) -> None:
    logits = random_logits(len(cases), seed=seed)
    rows = [
        row(requested, prompt, banned_tokens=banned_tokens, banned_draws=1)
        for requested, prompt, banned_tokens in cases
    ]
    found = sampling.Batch(rows, CPU).probabilities(logits)
    want = torch.stack(
        [transformers_scores(x, *case) for x, case in zip(logits, cases, strict=True)]
    )
    torch.testing.assert_close(found, want.softmax(dim=-1))


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(greedy_settings, ids, st.just([]) | ids), min_size=1, max_size=4),
)
def test_greedy_rows_draw_the_most_likely_token_after_transformers_filters(
    seed: int, cases: list[tuple[Sampling, list[int], list[int]]]
) -> None:
    logits = random_logits(len(cases), seed=seed)
    rows = [
        row(requested, prompt, banned_tokens=banned_tokens, banned_draws=1)
        for requested, prompt, banned_tokens in cases
    ]
    want = [
        int(transformers_scores(x, *case).argmax()) for x, case in zip(logits, cases, strict=True)
    ]
    assert sampling.Batch(rows, CPU).draw(logits) == want


def test_tokens_tied_with_the_kth_largest_stay_as_in_transformers() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    requested = Sampling(top_k=2)
    found = probabilities(logits, requested)
    assert (found > 0).tolist() == [False, True, True, True, True, False]
    torch.testing.assert_close(found, transformers_scores(logits, requested, [0], []).softmax(-1))


def test_on_a_tie_at_top_p_the_lowest_ids_stay() -> None:
    requested = Sampling(top_p=0.6)
    found = probabilities(torch.zeros(4), requested)
    # 1/2 is not enough and 3/4 is; transformers keeps the same number of tokens.
    assert (found > 0).tolist() == [True, True, True, False]
    theirs = transformers_scores(torch.zeros(4), requested, [0], [])
    assert int(theirs.isfinite().sum()) == 3


def test_the_token_that_reaches_top_p_is_the_last_to_stay() -> None:
    # Exact in binary: 1/2, 1/4, 1/8, 1/8.
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log2() * math.log(2)
    for top_p, kept in ((0.5, 1), (0.5001, 2), (0.75, 2), (0.7501, 3), (0.8751, 4)):
        assert int((probabilities(logits, Sampling(top_p=top_p)) > 0).sum()) == kept


@pytest.mark.parametrize(
    "requested",
    [
        Sampling(top_k=10**12),
        Sampling(top_p=1e-9),
        Sampling(top_p=5e-324),
        Sampling(min_p=1.0),
        Sampling(top_k=1),
    ],
)
def test_extreme_filters_keep_everything_or_only_the_top_token(requested: Sampling) -> None:
    logits = random_logits(1)[0]
    kept = int((probabilities(logits, requested) > 0).sum())
    assert kept == (VOCAB if requested.top_k > 1 else 1)
