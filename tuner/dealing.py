"""Dealing slots among heads by what each head alone would cost at several budgets.

Owns the curves through measured costs, and the greedy division of a fixed total. Knows nothing of
how costs are measured: they may come from passes in which one head alone evicts, or from curvature.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

FLOOR = 0.04
"""Fewest slots of a head as a share of the length: every curve is an extrapolation there."""

EXPONENTS = (0.25, 4.0)
"""Beyond the measured budgets cost falls with this power of the slots, at least and at most."""


def deal(
    costs: ArrayLike,
    budgets: Sequence[int],
    *,
    mean: int,
    floor: int,
    most: int,
    noise: ArrayLike = 0.0,
) -> NDArray[np.int64]:
    """Deal `mean` slots a head among all heads, so that the sum of predicted costs is the least.

    Slots are given one at a time to the head whose predicted cost falls most (of equal ones to the
    head with the fewest, then to the first). As predictions are convex, no division of the total
    costs less by them.

    Args:
        costs: [num_layers, num_kv_heads, budgets] nats: what each head costs with so many slots,
            less what costs nothing has. Neither order nor sign is presumed: noise breaks both.
        budgets: slots at which costs were measured, rising, at least one.
        mean: slots of a head, on average.
        floor: fewest slots of a head; at most `mean`.
        most: slots beyond which a head has no use for more, such as the sequence's length.
        noise: nats below which a cost tells nothing; a number, or of the shape of `costs`.

    Returns:
        [num_layers, num_kv_heads] slots, `mean` a head together.
    """
    measured = np.asarray(costs, dtype=np.float64)
    shape = measured.shape[:2]
    heads = shape[0] * shape[1]
    if not 1 <= floor <= mean <= most:
        raise ValueError(
            f"floor {floor}, mean {mean} and most {most}; accepted: 1 <= floor <= mean <= most"
        )
    curves = predicted(measured, budgets, range(floor, most + 1), noise=noise)
    gains = -np.diff(curves.reshape(heads, -1), axis=-1)
    # The slopes of the curve's lower convex hull. Greedy division is best for convex curves only.
    gains = np.array([isotonic_regression(row, increasing=False).x for row in gains]).reshape(
        heads, -1
    )
    slot, head = np.meshgrid(np.arange(gains.shape[1]), np.arange(heads))
    order = np.lexsort((head.ravel(), slot.ravel(), -gains.ravel()))
    taken = order[: heads * (mean - floor)]
    return (floor + np.bincount(head.ravel()[taken], minlength=heads)).reshape(shape)


def predicted(
    costs: ArrayLike, budgets: Sequence[int], at: Sequence[int], *, noise: ArrayLike = 0.0
) -> NDArray[np.float64]:
    """Predict what each head alone costs with other numbers of slots, by monotone curves.

    A curve is straight between measured points where both scales are logarithmic, and goes on
    beyond them as straight: a power law. Costs that rise with the slots are averaged (isotonic
    regression). A cost below half of the noise counts as that half; a head that has no other falls
    with the median power of the heads that are above it throughout.

    Args:
        costs, budgets, noise: as for `deal`.
        at: slots to predict for, from 1.

    Returns:
        [num_layers, num_kv_heads, at] nats, above 0 and never rising.
    """
    measured = np.asarray(costs, dtype=np.float64)
    least = np.maximum(np.broadcast_to(noise, measured.shape) / 2, 1e-9 * np.abs(measured).max())
    least = np.maximum(least, np.finfo(np.float64).tiny)
    falling = np.apply_along_axis(
        lambda row: isotonic_regression(row, increasing=False).x, -1, measured
    )
    known = falling > least
    # One figure for all unknown points of a head, or its noise would make a curve.
    logs = np.log(np.where(known, falling, least.min(axis=-1, keepdims=True)))
    x, wanted = np.log(budgets), np.log(at)
    # Of each segment, with one more at either end that goes on as its neighbour.
    powers = np.ones((*measured.shape[:2], len(x) + 1))
    if len(x) > 1:
        slopes = -np.diff(logs, axis=-1) / np.diff(x)
        told = slopes[known.all(axis=-1)]
        usual = float(np.median(told)) if told.size else 1.0
        powers[..., 1:-1] = slopes
        powers[..., [0, -1]] = slopes[..., [0, -1]].clip(*EXPONENTS)
        powers[~known.any(axis=-1)] = min(max(usual, EXPONENTS[0]), EXPONENTS[1])
        logs = logs[..., :1] - np.cumsum(powers[..., :-1] * np.diff(x, prepend=x[0]), axis=-1)
    segments = np.searchsorted(x, wanted, side="right")
    starts = np.maximum(segments - 1, 0)
    found: NDArray[np.float64] = np.exp(
        logs[..., starts] - powers[..., segments] * (wanted - x[starts])
    )
    return found
