"""Estimates the cost of fewer slots in each head alone, from the curvature at the full cache.

Owns the estimate. Without eviction the KL is 0, its minimum. So to second order the KL is half of
its curvature along d(t), the change that eviction makes to a head's attention output: half of the
mean over draws of (sum over t of g(t) . d(t))^2. Here g is the gradient of the log-likelihood of
tokens drawn from the model itself (Fisher information). Heads of one layer do not influence each
other within it. So one walk of a layer with all heads at one budget and one alpha gives the cost of
each head alone; passes in which one head evicts would be one pass per head. Knows nothing of how
the costs are used.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, log_softmax

from a2sf.cache.attention import attend_causally
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.schema import TablePolicy
from tuner.evaluation.objective import effective

SAMPLES = 4
"""Draws for the curvature. The standard error of one figure is sqrt(2 / 4) of it, and costs are
means over many examples."""


def work(walks: int) -> float:
    """The work of one profile of all examples, in passes over them under a policy.

    On a Llama of 135 million parameters in bfloat16, with 512 tokens, 4 draws and 36 walks, it took
    4.5 passes (two busy cores); this formula gives 5.6.
    """
    return (1 + 2 * SAMPLES + walks) / 8


def effects(
    model: LoadedModel,
    examples: Sequence[Example],
    policies: Sequence[TablePolicy],
    tick: Callable[[], object] = lambda: None,
) -> Tensor:
    """Compute how each head's eviction changes the model's output, for several examples at once.

    Memory, besides the model: rows x width x layers x (8 hidden + 3 intermediate + (2 + SAMPLES) x
    H_q D) numbers, and about rows x counted x vocabulary x 6.

    Args:
        model: the model.
        examples: the rows.
        policies: the policy of all heads in each walk, with one prefill_chunk.
        tick: called `ticks` times during the work.

    Returns:
        [rows, SAMPLES, num_layers, H_kv, policies] float64: the derivative along the change that
        the policy makes to that head. Half of the mean of its square is the head's cost in nats.
    """
    recorded = _RecordingAttention()
    attention = teacher_forcing.without_padding(examples, recorded)
    hidden = model.hidden_states(
        *teacher_forcing.inputs(model, examples), attention, differentiable=True
    )
    precision = torch.promote_types(model.dtype, torch.float32)
    draws = [
        _sampled_log_likelihoods(
            example,
            log_softmax(
                model.logits(hidden[row, list(example.counted)], differentiable=True).to(precision),
                dim=-1,
            ),
        )
        for row, example in enumerate(examples)
    ]
    outputs = [layer.output for layer in recorded.layers]
    tick()
    scores = []
    for number, draw in enumerate(zip(*draws, strict=True)):
        # Rows do not influence each other, so the gradient of the sum holds each example's
        # gradient.
        total = torch.stack(draw).sum()
        scores.append(torch.autograd.grad(total, outputs, retain_graph=number < SAMPLES - 1))
        tick()
    found = []
    for layer, one in enumerate(recorded.layers):
        gradient = torch.stack([score[layer] for score in scores], dim=1)
        found.append(_layer_effects(model, examples, policies, layer, one, gradient))
        tick()
    return torch.stack(found, dim=2).cpu()


def ticks(model: LoadedModel) -> int:
    """The number of steps of one call of `effects`; all take about the same time."""
    return 1 + SAMPLES + model.shape.num_layers


def _sampled_log_likelihoods(example: Example, log_probabilities: Tensor) -> list[Tensor]:
    """Log-likelihoods of SAMPLES continuations drawn from `said`, divided by sqrt(counted).

    `said` is [counted, vocab] log-probabilities. The expected square of a gradient is then the mean
    over counted positions.
    """
    # A generator per example, so that the draws do not depend on the other examples of the batch.
    generator = torch.Generator().manual_seed(zlib.crc32(repr(example.token_ids).encode()))
    tokens = torch.multinomial(
        log_probabilities.detach().exp().cpu(), SAMPLES, replacement=True, generator=generator
    )
    found = log_probabilities.gather(1, tokens.to(log_probabilities.device)).sum(dim=0) / math.sqrt(
        len(log_probabilities)
    )
    return list(found)


def _layer_effects(
    model: LoadedModel,
    examples: Sequence[Example],
    policies: Sequence[TablePolicy],
    layer: int,
    recorded: "_LayerRecord",
    gradient: Tensor,
) -> Tensor:
    """The effects in one layer, [rows, SAMPLES, H_kv, policies].

    `gradient` is [rows, SAMPLES, H_q, width, D].
    """
    # At least float32, because the change by eviction is small compared with the output that it
    # changes.
    precision = torch.promote_types(model.dtype, torch.float32)
    query, keys, values = (part.to(precision) for part in recorded.projected)
    full = attend_causally(query, keys, values, recorded.scale)
    rows, kv_heads = keys.shape[:2]
    found = []
    for policy in policies:
        chosen = [effective(policy, model, len(example.token_ids)) for example in examples]
        projected = (query, keys, values)
        output = teacher_forcing.walk(model, examples, chosen, layer, projected, recorded.scale)
        # The gradient of padding is zero.
        effect = torch.einsum("rshtd,rhtd->rsh", gradient.to(precision), output - full).double()
        found.append(effect.view(rows, SAMPLES, kv_heads, -1).sum(dim=-1))
    return torch.stack(found, dim=-1)


@dataclass(frozen=True)
class _LayerRecord:
    projected: tuple[Tensor, Tensor, Tensor]
    scale: float
    output: Tensor
    """[rows, H_q, width, D]; gradients are taken with respect to it."""


class _RecordingAttention:
    """Plain causal attention that records the inputs and the output of each layer."""

    def __init__(self) -> None:
        self.layers: list[_LayerRecord] = []

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        output = attend_causally(query, keys, values, scale)
        if not output.requires_grad:
            # In the lowest layer nothing requires a gradient, because no weight does. The graph
            # begins here.
            output.requires_grad_()
        projected = (query.detach(), keys.detach(), values.detach())
        self.layers.append(_LayerRecord(projected, scale, output))
        return output
