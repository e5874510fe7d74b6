"""What each head alone would cost with fewer slots, from the curvature at the full cache.

Owns the estimate. Where nothing is evicted the KL is 0 and at its least, so that to second order
it is half of its curvature along the change d(t) that eviction makes to a head's attention output:
half of the mean over draws of (sum over t of g(t) . d(t))^2, g the gradient of the log-likelihood
of what the model itself says (the Fisher information). Heads of one layer do not influence each
other within it, so that one walk of a layer with all heads at one budget and one alpha tells of
each head alone, where passes in which one head evicts would be one a head. Knows nothing of what is
concluded from the costs.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, log_softmax

from a2sf import teacher
from a2sf.attention import attend_causally
from a2sf.models import LoadedModel
from a2sf.schema import TablePolicy
from a2sf.teacher import Example
from tuner.objective import effective

SAMPLES = 4
"""Draws for the curvature: the standard error of one figure is sqrt(2 / 4) of it, and costs are
means over many examples."""


def work(walks: int) -> float:
    """What a look at all examples takes, in passes over them through all layers under a policy.

    On a Llama of 135 million parameters in bfloat16, with 512 tokens, 4 draws and 36 walks, it was
    4.5 passes (two busy cores); this says 5.6.
    """
    return (1 + 2 * SAMPLES + walks) / 8


def effects(
    model: LoadedModel,
    examples: Sequence[Example],
    policies: Sequence[TablePolicy],
    tick: Callable[[], object] = lambda: None,
) -> Tensor:
    """Look at examples together; say how each head's eviction moves what the model says.

    Memory, beside the model: rows x width x layers x (8 hidden + 3 intermediate + (2 + SAMPLES) x
    H_q D) numbers, and about rows x counted x vocabulary x 6.

    Args:
        model: loaded with `pack=False`.
        examples: the rows.
        policies: what all heads do in each of the walks, of one prefill_chunk.
        tick: called `ticks` times, as the work goes on.

    Returns:
        [rows, SAMPLES, num_layers, H_kv, policies] float64: the derivative along what the policy
        does to that head. Half of the mean of its square is the head's cost in nats.
    """
    seen = _Seen()
    attention = teacher.without_padding(examples, seen)
    hidden = model.hidden_states(*teacher.inputs(model, examples), attention, differentiable=True)
    precision = torch.promote_types(model.dtype, torch.float32)
    draws = [
        _drawn(
            example,
            log_softmax(
                model.logits(hidden[row, list(example.counted)], differentiable=True).to(precision),
                dim=-1,
            ),
        )
        for row, example in enumerate(examples)
    ]
    outputs = [layer.output for layer in seen.layers]
    tick()
    scores = []
    for number, draw in enumerate(zip(*draws, strict=True)):
        # Rows are strangers to each other, so the gradient of the sum is each example's own.
        total = torch.stack(draw).sum()
        scores.append(torch.autograd.grad(total, outputs, retain_graph=number < SAMPLES - 1))
        tick()
    found = []
    for layer, one in enumerate(seen.layers):
        gradient = torch.stack([score[layer] for score in scores], dim=1)
        found.append(_of_layer(model, examples, policies, layer, one, gradient))
        tick()
    return torch.stack(found, dim=2).cpu()


def ticks(model: LoadedModel) -> int:
    """Steps of one look, which take about as long as each other."""
    return 1 + SAMPLES + model.shape.num_layers


def _drawn(example: Example, said: Tensor) -> list[Tensor]:
    """Log-likelihoods of SAMPLES continuations drawn from `said`, [counted, vocab], by square root.

    Squares of their gradients then have the mean over counted positions as their expectation.
    """
    # Its own numbers for each example, whichever others are looked at with it.
    generator = torch.Generator().manual_seed(zlib.crc32(repr(example.token_ids).encode()))
    tokens = torch.multinomial(
        said.detach().exp().cpu(), SAMPLES, replacement=True, generator=generator
    )
    found = said.gather(1, tokens.to(said.device)).sum(dim=0) / math.sqrt(len(said))
    return list(found)


def _of_layer(
    model: LoadedModel,
    examples: Sequence[Example],
    policies: Sequence[TablePolicy],
    layer: int,
    seen: "_Layer",
    gradient: Tensor,
) -> Tensor:
    """The effects in one layer, [rows, SAMPLES, H_kv, policies].

    `gradient` is [rows, SAMPLES, H_q, width, D].
    """
    # Whatever the model's dtype: what eviction changes is small beside what it changes.
    precision = torch.promote_types(model.dtype, torch.float32)
    query, keys, values = (part.to(precision) for part in seen.projected)
    full = attend_causally(query, keys, values, seen.scale)
    rows, kv_heads = keys.shape[:2]
    found = []
    for policy in policies:
        chosen = [effective(policy, model, len(example.token_ids)) for example in examples]
        projected = (query, keys, values)
        output = teacher.walk(model, examples, chosen, layer, projected, seen.scale)
        # No gradient reaches padding.
        moved = torch.einsum("rshtd,rhtd->rsh", gradient.to(precision), output - full).double()
        found.append(moved.view(rows, SAMPLES, kv_heads, -1).sum(dim=-1))
    return torch.stack(found, dim=-1)


@dataclass(frozen=True)
class _Layer:
    projected: tuple[Tensor, Tensor, Tensor]
    scale: float
    output: Tensor
    """[rows, H_q, width, D], where gradients are taken."""


class _Seen:
    """Plain causal attention that keeps what each layer was given and gave."""

    def __init__(self) -> None:
        self.layers: list[_Layer] = []

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        output = attend_causally(query, keys, values, scale)
        if not output.requires_grad:
            # The lowest layer: no weight asks for a gradient, so that all begins here.
            output.requires_grad_()
        projected = (query.detach(), keys.detach(), values.detach())
        self.layers.append(_Layer(projected, scale, output))
        return output
