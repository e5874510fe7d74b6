"""Intervals: what they cover, and that pairing is what finds a small effect."""

import numpy as np
import pytest
from scipy import stats

from tuner.evaluation.statistics import (
    CONFIDENCE,
    difference,
    enough_examples,
    estimate,
    holm,
    sign_flip_p,
)


def test_an_interval_covers_the_true_mean_at_about_its_confidence() -> None:
    rng = np.random.default_rng(0)
    runs, covered = 300, 0
    for run in range(runs):
        interval = estimate(rng.exponential(size=40), seed=run, resamples=499)
        assert interval.low <= interval.mean <= interval.high
        covered += interval.low <= 1.0 <= interval.high
    # Skewed samples of 40 cover a little less than asked; far less would be a fault.
    assert CONFIDENCE - 0.06 < covered / runs < CONFIDENCE + 0.035


def test_a_planted_null_is_called_an_effect_at_about_the_stated_rate() -> None:
    rng = np.random.default_rng(1)
    runs, wins = 300, 0
    for run in range(runs):
        base = rng.exponential(size=64)
        ours = base + rng.normal(scale=0.1, size=64)
        wins += difference(ours, base, seed=run, resamples=499).high < 0
    # One side of a 95 % interval: 2.5 %, plus three standard deviations of the count.
    assert wins / runs < 0.025 + 3 * (0.025 * 0.975 / runs) ** 0.5


def test_a_planted_effect_is_found_by_pairing_where_the_separate_intervals_overlap() -> None:
    rng = np.random.default_rng(2)
    base = rng.exponential(size=64)
    ours = base - 0.05 + rng.normal(scale=0.05, size=64)
    assert difference(ours, base).high < 0
    assert estimate(ours).high > estimate(base).low


def test_the_interval_of_many_values_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(size=2000)
    interval = estimate(values)
    low, high = stats.norm.interval(CONFIDENCE, values.mean(), stats.sem(values))
    assert abs(interval.low - low) < 0.005
    assert abs(interval.high - high) < 0.005


def test_values_that_never_differ_have_an_interval_of_no_width() -> None:
    interval = difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (interval.low, interval.mean, interval.high) == (0.0, 0.0, 0.0)
    rounded = estimate([1.0, 1.0 + 2e-16, 1.0])
    assert rounded.low == rounded.high == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(4).normal(size=30)
    assert estimate(values, seed=5) == estimate(values, seed=5) != estimate(values, seed=6)


def test_holm_is_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("comparisons", [1, 5, 9])
def test_examples_are_enough_where_the_most_even_gain_stays_significant(comparisons: int) -> None:
    def corrected(examples: int) -> float:
        gains = [[-1.0] * examples] * comparisons
        return max(holm(sign_flip_p(gains)))

    enough = enough_examples(comparisons)
    assert corrected(enough) < 1 - CONFIDENCE <= corrected(enough - 1)


def test_the_sign_flip_test_is_exact_on_few_pairs() -> None:
    # Of the 2^5 sign patterns only this one and its mirror are as far from zero.
    assert sign_flip_p([[0.1, 0.2, 0.3, 0.4, 0.5], [0.0] * 5]) == [2 / 32, 1.0]


def test_the_sign_flip_test_errs_at_about_the_stated_rate_and_finds_an_effect() -> None:
    rng = np.random.default_rng(5)
    nothing = sign_flip_p(rng.normal(size=(400, 40)).tolist(), resamples=999)
    wrong = np.mean([p < 0.05 for p in nothing])
    assert wrong < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
    assert min(holm(nothing)) > 0.001
    assert max(sign_flip_p((1 + rng.normal(size=(5, 64))).tolist())) < 0.001
