"""A double of teacher forcing through eviction that gradients flow through.

Owns the record of what each layer saw and which tokens it kept under a policy, and the plain
attention to exactly those tokens. Its values are the walk's up to rounding; only what would be
evicted if a value changed is not in its gradients. Knows nothing of what these are used for.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, log_softmax
from torch.nn.functional import kl_div, scaled_dot_product_attention

from a2sf import teacher
from a2sf.models import LoadedModel
from a2sf.policy import EffectivePolicy
from a2sf.teacher import Example
from tuner.objective import full_cache

SAMPLES = 3
"""Draws for the curvature: the standard error of one figure is sqrt(2 / 3) of it, and figures are
means over many examples."""


@dataclass(frozen=True)
class Seen:
    """What a layer was given and did under the base."""

    projected: tuple[Tensor, Tensor, Tensor]
    """Queries [rows, H_q, width, D], and keys and values [rows, H_kv, width, D]."""
    scale: float
    output: Tensor
    """[rows, H_q, width, D]"""
    kept: Tensor
    """[rows, H_kv, width, width] bool: which tokens each query was given."""


@dataclass(frozen=True)
class Gradients:
    """Derivatives with respect to each layer's attention output: of each [rows, H_q, width, D].

    Of each row its own example's.
    """

    cost: tuple[Tensor, ...]
    """Of the objective: mean KL(full cache || kept) over the counted positions, nats."""
    scores: tuple[tuple[Tensor, ...], ...]
    """Of the log-likelihood of what the model itself says, for each of SAMPLES draws.

    The mean over draws of (score . change)^2 estimates the curvature of the cost along a change:
    the Fisher information, which is what the Hessian of a KL is near its minimum.
    """


def walked(
    model: LoadedModel, examples: Sequence[Example], policies: Sequence[EffectivePolicy]
) -> list[Seen]:
    """Run along examples under policies of one prefill_chunk; say what each layer saw and did."""
    walking = _Walked(model, examples, policies)
    attention = teacher.without_padding(examples, walking)
    # Not that gradients are asked for here, but tensors of inference mode could not take part.
    model.hidden_states(*teacher.inputs(model, examples), attention, differentiable=True)
    return walking.seen


def masked(
    model: LoadedModel, examples: Sequence[Example], seen: Sequence[Seen]
) -> tuple[list[Tensor], list[Tensor]]:
    """Run along examples with plain attention to what was kept, so that gradients can be taken.

    Returns each example's logits [counted, vocab], and each layer's attention output
    [rows, H_q, width, D]; `model` must have been loaded with `pack=False`.
    """
    masking = _Masked(seen)
    attention = teacher.without_padding(examples, masking)
    hidden = model.hidden_states(*teacher.inputs(model, examples), attention, differentiable=True)
    logits = [
        model.logits(hidden[row, list(example.counted)], differentiable=True)
        for row, example in enumerate(examples)
    ]
    return logits, masking.outputs


def gradients(model: LoadedModel, examples: Sequence[Example], seen: Sequence[Seen]) -> Gradients:
    """Differentiate what eviction costs, and what the model says, by each attention output."""
    logits, outputs = masked(model, examples, seen)
    precision = torch.promote_types(model.dtype, torch.float32)
    said = [log_softmax(mine.to(precision), dim=-1) for mine in logits]
    costs = [
        kl_div(mine, full, reduction="none", log_target=True).sum(dim=-1).mean()
        for mine, full in zip(said, full_cache(model, examples), strict=True)
    ]
    draws = [_drawn(example, mine) for example, mine in zip(examples, said, strict=True)]
    # Rows are strangers to each other, so the gradient of the sum is each example's own.
    sums = [
        torch.stack(costs).sum(),
        *(torch.stack(draw).sum() for draw in zip(*draws, strict=True)),
    ]
    cost, *scores = (torch.autograd.grad(one, outputs, retain_graph=True) for one in sums)
    return Gradients(cost, tuple(scores))


def _drawn(example: Example, said: Tensor) -> list[Tensor]:
    """Log-likelihoods of SAMPLES continuations drawn from `said`, [counted, vocab], by square root.

    Squares of their gradients then have the mean over counted positions as their expectation.
    """
    # Its own numbers for each example, whichever others are in the batch.
    generator = torch.Generator().manual_seed(zlib.crc32(repr(example.token_ids).encode()))
    tokens = torch.multinomial(
        said.detach().exp().cpu(), SAMPLES, replacement=True, generator=generator
    )
    found = said.gather(1, tokens.to(said.device)).sum(dim=0) / math.sqrt(len(said))
    return list(found)


class _Walked:
    """Walks each layer's rows under a policy, and keeps what it saw."""

    def __init__(
        self, model: LoadedModel, examples: Sequence[Example], policies: Sequence[EffectivePolicy]
    ) -> None:
        self.seen: list[Seen] = []
        self._of = (model, examples, policies)

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        projected = (query, keys, values)
        output, kept = teacher.walk(*self._of, layer, projected, scale)
        self.seen.append(Seen(projected, scale, output, kept))
        return output


class _Masked:
    """Plain attention to exactly the tokens that were kept, through which gradients flow."""

    def __init__(self, seen: Sequence[Seen]) -> None:
        self.outputs: list[Tensor] = []
        """By layer [rows, H_q, width, D], where gradients are taken."""
        self._seen = seen

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        kept = self._seen[layer].kept
        # Padding's queries may be left without a token, of which some kernels make NaN.
        mask = kept | torch.eye(kept.shape[-1], dtype=torch.bool, device=kept.device)
        rows, kv_heads, width, dim = keys.shape
        # Each KV head of a row is a batch entry of its own, for each has a mask of its own.
        entries = (rows * kv_heads, -1, width, dim)
        group = query.shape[1] // kv_heads
        k, v = (t.reshape(entries).expand(-1, group, -1, -1) for t in (keys, values))
        output = scaled_dot_product_attention(
            query.reshape(entries), k, v, attn_mask=mask.flatten(0, 1)[:, None], scale=scale
        ).view_as(query)
        if not output.requires_grad:
            # The lowest layer: no weight asks for a gradient, so that all begins here.
            output.requires_grad_()
        self.outputs.append(output)
        return output
