"""Splits slots among heads by the cost of each head alone at several budgets.

Owns the curves through measured costs, and the greedy division of a fixed total. Knows nothing of
how costs are measured: from passes in which one head alone evicts, or from curvature.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

EXPONENTS = (0.25, 4.0)
"""Outside the measured budgets, cost falls with a power of the slots: the limits of this power."""


def split_by_cost(
    costs: ArrayLike,
    budgets: Sequence[int],
    *,
    mean: int,
    floor: int,
    max_slots: int,
    noise: ArrayLike = 0.0,
) -> NDArray[np.int64]:
    """Split `mean` slots per head among all heads, to minimise the sum of predicted costs.

    Slots are assigned one at a time to the head whose predicted cost falls most. A tie goes to the
    head with the fewest slots, then to the first head. No other division has a lower cost on the
    lower convex hulls of the predicted curves.

    Args:
        costs: [num_layers, num_kv_heads, budgets] nats: the cost of each head at each budget, minus
            the cost without eviction. Any order and sign is accepted, because costs are noisy.
        budgets: slots at which costs were measured, rising, at least one.
        mean: mean slots of a head.
        floor: fewest slots of a head; at most `mean`.
        max_slots: largest useful number of slots of a head, such as the sequence's length.
        noise: nats below which a cost is not significant; a number, or of the shape of `costs`.

    Returns:
        [num_layers, num_kv_heads] slots, with a mean of `mean` per head.
    """
    measured = np.asarray(costs, dtype=np.float64)
    shape = measured.shape[:2]
    heads = shape[0] * shape[1]
    if not 1 <= floor <= mean <= max_slots:
        raise ValueError(
            f"floor {floor}, mean {mean} and max_slots {max_slots}; accepted: "
            "1 <= floor <= mean <= max_slots"
        )
    curves = predict_costs(measured, budgets, range(floor, max_slots + 1), noise=noise)
    gains = -np.diff(curves.reshape(heads, -1), axis=-1)
    # The slopes of the curve's lower convex hull, because greedy division is optimal only for
    # convex curves.
    gains = np.array([isotonic_regression(row, increasing=False).x for row in gains]).reshape(
        heads, -1
    )
    slot, head = np.meshgrid(np.arange(gains.shape[1]), np.arange(heads))
    order = np.lexsort((head.ravel(), slot.ravel(), -gains.ravel()))
    taken = order[: heads * (mean - floor)]
    return (floor + np.bincount(head.ravel()[taken], minlength=heads)).reshape(shape)


def predict_costs(
    costs: ArrayLike, budgets: Sequence[int], at: Sequence[int], *, noise: ArrayLike = 0.0
) -> NDArray[np.float64]:
    """Predict the cost of each head alone at other numbers of slots, by monotone curves.

    A curve is linear between measured points on log-log scales, and continues linearly beyond them
    (a power law). Costs that rise with the slots are averaged (isotonic regression). A cost below
    half of the noise counts as that half. A head with only such costs falls with the median power
    of the heads whose costs are all above it.

    Args:
        costs, budgets, noise: as for `split_by_cost`.
        at: slots to predict for, from 1.

    Returns:
        [num_layers, num_kv_heads, at] nats, above 0 and never rising.
    """
    measured = np.asarray(costs, dtype=np.float64)
    lowest = np.maximum(np.broadcast_to(noise, measured.shape) / 2, 1e-9 * np.abs(measured).max())
    lowest = np.maximum(lowest, np.finfo(np.float64).tiny)
    falling = np.apply_along_axis(
        lambda row: isotonic_regression(row, increasing=False).x, -1, measured
    )
    significant = falling > lowest
    # One value for all unknown points of a head; otherwise their noise would shape the curve.
    logs = np.log(np.where(significant, falling, lowest.min(axis=-1, keepdims=True)))
    x, log_slots = np.log(budgets), np.log(at)
    # One power per segment, and one at either end: its neighbour within EXPONENTS.
    powers = np.ones((*measured.shape[:2], len(x) + 1))
    if len(x) > 1:
        slopes = -np.diff(logs, axis=-1) / np.diff(x)
        measured_powers = slopes[significant.all(axis=-1)]
        median_power = float(np.median(measured_powers)) if measured_powers.size else 1.0
        powers[..., 1:-1] = slopes
        powers[..., [0, -1]] = slopes[..., [0, -1]].clip(*EXPONENTS)
        powers[~significant.any(axis=-1)] = min(max(median_power, EXPONENTS[0]), EXPONENTS[1])
        logs = logs[..., :1] - np.cumsum(powers[..., :-1] * np.diff(x, prepend=x[0]), axis=-1)
    segments = np.searchsorted(x, log_slots, side="right")
    starts = np.maximum(segments - 1, 0)
    found: NDArray[np.float64] = np.exp(
        logs[..., starts] - powers[..., segments] * (log_slots - x[starts])
    )
    return found
