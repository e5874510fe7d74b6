"""Other published rules that split the same slots, for comparison with a table.

Owns their schedules and their sources. Knows nothing of examples, of costs, or of the spelling of
policies on a command line.
"""

import numpy as np

from a2sf.errors import InvalidArgument
from a2sf.policy import CachePolicy, EffectivePolicy
from a2sf.schema import Frozen, TablePolicy

BETA = 20
"""PyramidKV's default: the top layer gets a twentieth of the mean layer's slots."""


FLOOR = 0.2
"""AdaKV's default: the share of its equal part that every head is guaranteed."""


class Pyramid(Frozen):
    """PyramidKV's schedule (arXiv 2406.02069): many slots in the lowest layer, few in the top one.

    Sinks and the recent window are reserved equally in all layers. The other slots decrease
    linearly from layer to layer: with r slots per layer on average, the top layer gets r / BETA and
    the lowest 2 r - r / BETA. If the sequence is shorter than that, the lowest layer gets its
    length and the top layer the remainder. The block law decides which tokens a layer keeps.
    """

    equal: CachePolicy
    """The same policy with equal slots: a uniform alpha (1: accumulated attention), the protection,
    and the mean budget."""

    def table(self, equal: EffectivePolicy, length: int) -> TablePolicy:
        """Return the table with this schedule for a sequence of `length` tokens.

        `equal` is the field `equal`, resolved for that length.
        """
        layers, heads = len(equal.alpha), len(equal.alpha[0])
        reserved = equal.sinks + equal.recent
        rest = equal.budget - reserved
        # Every layer needs at least one slot that is not reserved.
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
    """AdaKV's rule (arXiv 2407.11550): each prompt's scores split a layer's slots among its heads.

    The block law scores a prompt. At its end all heads of a layer share one pool, the tokens with
    the highest scores are kept, and each head is guaranteed FLOOR of its equal part. Afterwards
    each head keeps its number of slots. A prompt that is read in steps of one token has no such
    end.
    """

    equal: CachePolicy
    """The same policy with equal slots: a uniform alpha (1: accumulated attention), the protection,
    and the budget."""

    def pooled(self, equal: EffectivePolicy) -> EffectivePolicy:
        """Return the policy, given `equal` resolved.

        Raises InvalidArgument for steps of one token.
        """
        if equal.prefill_chunk == 1:
            raise InvalidArgument(
                "prefill_chunk",
                "1 reads a prompt step by step, but adakv splits the slots once, at its end; "
                "accepted: 0 for the whole prompt, or blocks of 2 tokens or more",
            )
        return equal.model_copy(update={"pooled_floor": FLOOR})
