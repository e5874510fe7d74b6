"""A draw follows the filtered distribution, and depends on its own row and seed alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from a2sf import sampling
from a2sf.requests import Sampling


@given(
    st.integers(0, 10**6),
    st.floats(0.2, 3.0),
    st.integers(0, 40),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.9),
)
def test_the_filters_equal_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 3
    wish = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    want = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        want = TopKLogitsWarper(min(top_k, 32))(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    if min_p > 0:
        want = MinPLogitsWarper(min_p)(None, want)
    torch.testing.assert_close(sampling.filtered_probabilities(logits, wish), want[0].softmax(-1))


def test_draws_are_as_frequent_as_the_distribution_says() -> None:
    logits = torch.tensor([0.1, 2.0, -1.0, 1.0, 0.5])
    wish = Sampling(temperature=0.9, top_k=4)
    noise = sampling.generator(1)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[sampling.draw(logits, wish, noise)] += 1
    want = sampling.filtered_probabilities(logits, wish)
    assert counts[2] == 0
    torch.testing.assert_close(counts / 4000, want, rtol=0, atol=0.03)


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    logits = torch.zeros(50)

    def draws(seed: int) -> list[int]:
        noise = sampling.generator(seed)
        return [sampling.draw(logits, Sampling(), noise) for _ in range(20)]

    assert draws(3) == draws(3) != draws(4)


def test_greedy_takes_the_most_likely_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([0.0, 5.0, 5.0])
    assert sampling.draw(logits, Sampling(temperature=0.0), sampling.generator(0)) == 1


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_a_given_seed_is_kept(seed: int) -> None:
    assert sampling.choose_seed(Sampling(seed=seed)) == seed
