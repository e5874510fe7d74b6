"""Other published ways to deal the same slots, which a table is compared with.

Owns their schedules and where they come from. Knows nothing of examples, of costs, or of how a
policy is written on a command line.
"""

import numpy as np

from a2sf.errors import InvalidArgument
from a2sf.policy import CachePolicy, EffectivePolicy
from a2sf.schema import Frozen, TablePolicy

BETA = 20
"""PyramidKV's default: the top layer gets a twentieth of what the mean layer does."""


FLOOR = 0.2
"""AdaKV's default: the share of its equal part that every head is sure of."""


class Pyramid(Frozen):
    """PyramidKV's schedule (arXiv 2406.02069): many slots in the lowest layer, few in the top one.

    Sinks and the recent window are reserved in all layers alike. The rest falls from layer to layer
    by the same number: with r slots a layer on average, the top layer gets r / BETA and the lowest
    2 r - r / BETA; where the sequence has fewer, the lowest gets those and the top what that
    leaves. Which tokens a layer keeps is up to the block law.
    """

    equal: CachePolicy
    """The same with equal slots: a uniform alpha (1: accumulated attention), what is protected,
    and the mean budget."""

    def table(self, equal: EffectivePolicy, length: int) -> TablePolicy:
        """The table that stands for the schedule on a sequence of `length` tokens.

        `equal` is what the policy of that name comes to there.
        """
        layers, heads = len(equal.alpha), len(equal.alpha[0])
        reserved = equal.sinks + equal.recent
        rest = equal.budget - reserved
        # A layer without a slot to compete for could not take part at all.
        top = max(rest / BETA, 1.0)
        lowest = min(2 * rest - top, max(length - reserved, rest))
        slots = reserved + np.linspace(lowest, 2 * rest - lowest, layers)
        return TablePolicy(
            alpha=equal.alpha,
            head_share=tuple((x / equal.budget,) * heads for x in slots.tolist()),
            budget=equal.budget,
            recent=equal.recent,
            sinks=equal.sinks,
            prefill_chunk=equal.prefill_chunk,
        )


class AdaKV(Frozen):
    """AdaKV's rule (arXiv 2407.11550): each prompt's own scores deal a layer's slots among heads.

    The block law scores a prompt; at its end all heads of a layer share one pool, which the highest
    scores win, and each head is sure of FLOOR of what it would have alone. From then on a head
    keeps to what it got. A prompt that is read in steps of one token has no end to deal at.
    """

    equal: CachePolicy
    """The same with equal slots: a uniform alpha (1: accumulated attention), what is protected,
    and the budget."""

    def pooled(self, equal: EffectivePolicy) -> EffectivePolicy:
        """The policy, from what `equal` comes to. Raises InvalidArgument for steps of one token."""
        if equal.prefill_chunk == 1:
            raise InvalidArgument(
                "prefill_chunk",
                "1 reads a prompt step by step, and adakv deals slots once at its end; accepted: "
                "0 for the whole prompt, or blocks of 2 tokens or more",
            )
        return equal.model_copy(update={"pooled_floor": FLOOR})
