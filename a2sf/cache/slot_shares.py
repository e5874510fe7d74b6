"""The number of slots that each head gets: a mean, split in proportion to the heads' shares.

Owns this arithmetic: a request's slots, a row's slots, and the mean that gives each head enough.
Knows nothing of policies, tables or options.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain, islice, pairwise

from a2sf.policy import Heads

Shares = tuple[tuple[float, ...], ...]
"""One weight per layer and KV head. Slots are split among heads in proportion to the weights."""


def split_slots(budget: int, shares: Sequence[Sequence[float]], most: int, least: int = 0) -> Heads:
    """Split layers x heads x `budget` slots among all heads in proportion to their shares.

    If `budget` is `most` or more, every head gets `budget`. Otherwise no head gets more than
    `most`, and none less than `least`, or than the budget if that is smaller. The other heads split
    the rest in proportion to their shares. The running total over layers and heads is rounded
    (halves up), so that the sum is exact and equal shares get equal slots.

    Args:
        budget: slots per head, averaged over all heads.
        shares: [layers][heads] positive weights; only their proportions matter.
        most: the most slots that a head can use, such as the sequence's length.
        least: the fewest slots that a head needs to hold what is protected.

    Returns:
        [layers][heads] slots; their sum is `layers * heads * budget`. A head with a very small
        share may get 0.
    """
    if budget >= most:
        return tuple((budget,) * len(layer) for layer in shares)
    least = min(least, budget)
    # Whole numbers throughout: in floats a rounded total could give a head more than `most`.
    ratios = [share.as_integer_ratio() for layer in shares for share in layer]
    unit = max(denominator for _, denominator in ratios)
    weights = [numerator * (unit // denominator) for numerator, denominator in ratios]
    slots, weight = budget * len(weights), sum(weights)
    settled: dict[int, int] = {}
    while True:
        open_heads = [head for head in range(len(weights)) if head not in settled]
        over = {h: x for h in open_heads if (x := weights[h] * slots - most * weight) >= 0}
        under = {h: x for h in open_heads if (x := least * weight - weights[h] * slots) > 0}
        if not over and not under:
            break
        # Settle the side with the larger total first: the slots that it frees or takes move the
        # heads of the other side towards the allowed range.
        full = sum(over.values()) >= sum(under.values())
        for head in over if full else under:
            settled[head] = most if full else least
            slots, weight = slots - settled[head], weight - weights[head]
    fixed, open_weight, total = 0, 0, [0]
    for head, share in enumerate(weights):
        if head in settled:
            fixed += settled[head]
        else:
            open_weight += share
        by_share = (2 * slots * open_weight + weight) // (2 * weight) if weight else 0
        total.append(fixed + by_share)
    heads = (end - begin for begin, end in pairwise(total))
    return tuple(tuple(islice(heads, len(layer))) for layer in shares)


def slots_for(budget: int, shares: Sequence[Sequence[float]], most: int) -> int:
    """Return the mean slots per head with which `split_slots` gives every head at least `budget`.

    `most` is as for `split_slots`: the most slots that a head can use.
    """
    weights = [Fraction(share) for layer in shares for share in layer]
    limit = Fraction(max(budget, most))
    heads = (min(budget * weight / min(weights), limit) for weight in weights)
    return math.ceil(sum(heads, Fraction()) / len(weights))


def slots_per_head(slots: int, shares: Shares, max_context: int) -> Heads:
    """Return the slots of each layer and head of a row with `slots`, split by `shares`.

    No head gets more than `max_context`, the tokens of the longest sequence: it could not fill
    them. The other heads get the rest, so the bytes of a row are the same. With that many `slots`,
    all heads are equal.
    """
    return split_slots(slots, shares, max_context)


def max_slots_per_head(budget: int, shares: Shares, max_context: int) -> Heads:
    """Return the most slots that each head takes of `budget`, over all lengths up to `max_context`.

    No head takes more slots than the sequence has tokens; the rest goes to the other heads. So a
    head takes the most slots at the greatest length that it can hold completely; heads with larger
    shares hold that length completely too.
    """
    # Exact, because a sum in floats could give a head one slot too many.
    weights = [Fraction(weight) for weight in chain(*shares)]
    total = budget * len(weights)

    def peak(weight: Fraction) -> int:
        alone = math.ceil(total * weight / sum(min(weight, other) for other in weights))
        return min(alone, max(budget, max_context))

    return tuple(tuple(peak(Fraction(weight)) for weight in row) for row in shares)
