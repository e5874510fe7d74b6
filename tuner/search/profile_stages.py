"""The stages that choose settings by the sensitivity profile.

Owns the settings that they propose: slots split among heads, and an alpha for each head at its
slots. The sum of single costs is only a prior: every proposal is measured like any other setting.
Knows nothing of how the profile is made (`tuner.search.sensitivity`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from a2sf.policy import EffectivePolicy
from tuner.evaluation.objective import effective
from tuner.search.results import TrialResult
from tuner.search.sensitivity import Profile
from tuner.search.space import Setting, log_tau_of, shares
from tuner.search.trials import Trials

POWERS = (1.0, 0.75)
"""Exponents for the computed shares: unchanged, and closer to equal, because costs of single heads
do not add up."""


MAX_PROPOSALS = 2 * len(POWERS) + 3
"""Largest number of settings that `split_by_profile` and `alphas` together propose."""


MIN_SHARE = 0.2
"""Fewest slots of a head as a share of the mean: with a budget of a fifth of the length, .04 of the
length."""


def split_by_profile(trials: Trials, best: TrialResult, profile: Profile) -> TrialResult:
    """Measure settings with slots split by the profile, as a stage; return the best.

    Slots are split by each head's cost at the alpha nearest to the best setting's.
    """
    usual = log_tau_of(best.setting.alpha[0][0])
    nearest = min(
        range(len(profile.alphas)), key=lambda at: abs(log_tau_of(profile.alphas[at]) - usual)
    )
    split = _split_settings(trials, best.setting, profile, nearest)
    return _best_of(trials, "dealt", split, best)


def alphas(trials: Trials, best: TrialResult, profile: Profile) -> TrialResult:
    """Measure settings with alphas from the profile, as a stage; return the best.

    These are: every head at the cheapest alpha for its slots; the same for only the half, and the
    quarter, of heads that gain most; and, unless slots are equal, slots split again by each head's
    cost at its cheapest alpha, with those alphas.
    """
    settings = [_with_cheapest_alphas(trials, best.setting, profile, part) for part in (1, 2, 4)]
    if best.setting.head_share != trials.spec.equal:
        again = _split_settings(trials, best.setting, profile, None)
        settings += [_with_cheapest_alphas(trials, split, profile) for split in again]
    return _best_of(trials, "alphas", settings, best)


def search_per_layer(trials: Trials, best: TrialResult, profile: Profile) -> TrialResult:
    """Measure settings from the profile in which all heads of a layer are alike; return the best.

    A baseline from the same profile by the same steps as `split_by_profile` and `alphas`. The gain
    of a table over it is the value of separate heads.
    """
    layers = profile.by_layer()
    return alphas(trials, split_by_profile(trials, best, layers), layers)


def _split_settings(
    trials: Trials, setting: Setting, profile: Profile, alpha: int | None
) -> list[Setting]:
    """Settings with slots split by the costs at an alpha, or at each head's cheapest (None)."""
    mean = _slots(trials, setting, profile).budget
    # Room in every head for a token that is not protected.
    floor = max(math.ceil(MIN_SHARE * mean), setting.sinks + 2)
    if not floor < mean < profile.length:
        return []
    heads = profile.split(mean, floor, alpha).astype(np.float64)
    split = np.broadcast_to(heads, (trials.spec.num_layers, trials.spec.num_kv_heads))
    return [replace(setting, head_share=shares((split**power).tolist())) for power in POWERS]


def _with_cheapest_alphas(
    trials: Trials, setting: Setting, profile: Profile, part: int = 1
) -> Setting:
    """The setting with the cheapest alphas in the 1 / `part` of heads that gain most."""
    if not trials.feasible(setting):
        return setting
    # If one head represents a whole layer, use its first head; the others are the same.
    heads = slice(profile.costs.shape[1])
    costs = profile.at(np.array(_slots(trials, setting, profile).head_budgets)[:, heads])
    scale = [log_tau_of(alpha) for alpha in profile.alphas]
    alpha = np.array(setting.alpha)[:, heads]
    places = np.vectorize(log_tau_of)(alpha)
    now = np.array(
        [
            np.interp(x, scale, y)
            for x, y in zip(places.flat, costs.reshape(-1, len(scale)), strict=True)
        ]
    ).reshape(places.shape)
    gain = now - costs.min(axis=-1)
    ranks = (-gain).argsort(axis=None, kind="stable").argsort().reshape(gain.shape)
    taken = (gain > 0) & (ranks < -(-gain.size // part))
    chosen = np.where(taken, np.take(profile.alphas, costs.argmin(axis=-1)), alpha)
    whole = np.broadcast_to(chosen, np.shape(setting.alpha))
    return replace(setting, alpha=tuple(map(tuple, whole.tolist())))


def _slots(trials: Trials, setting: Setting, profile: Profile) -> EffectivePolicy:
    return effective(trials.spec.policy(setting), trials.objective.model, profile.length)


def _best_of(
    trials: Trials, batch: str, settings: Sequence[Setting], best: TrialResult
) -> TrialResult:
    different = [one for one in dict.fromkeys(settings) if one != best.setting]
    feasible = [one for one in different if trials.feasible(one)]
    tried = trials.measure(batch, feasible, best=best)
    better = [one for one in tried if one.gain(best) > 0]
    return min(better, key=lambda one: one.mean, default=best)
