"""What carries out the law where tokens come one after the other.

Owns the choice between torch's operations, on any device, numba's programs for processors
(`kernels.walk`) and the Triton kernels: for the rows that decode together, one token of each
through the model, on GPUs in CUDA graphs (`fused`), and for texts that are given, all tokens
through one layer at a time. Knows nothing of requests or of when a row begins and ends.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from a2sf import kernels
from a2sf.attention import BlockAttention, DecodePass, attend_and_charge
from a2sf.cache import PolicyTensors, Slots
from a2sf.errors import InvalidArgument
from a2sf.kept import Kept
from a2sf.models import LayerAttention, LoadedModel
from a2sf.policy import EffectivePolicy, Heads

Kernels = Literal["auto", "torch", "triton", "numba"]
"""What may be asked for."""

Carrier = Literal["torch", "triton", "numba"]
"""What carries out the law."""

Steps = Callable[[Tensor], LayerAttention]
"""Given where each row's next token stands, [rows] int64, what carries these through the layers."""


class Decoder(Protocol):
    """Runs the first rows of a slab, and remembers what each needs beside its slots."""

    def join(
        self,
        row: int,
        source: Slots,
        source_row: int,
        counts: Heads,
        policy: EffectivePolicy,
        longest: int,
    ) -> None:
        """Let `row` hold what `source_row` of other slots holds, and decode under a policy.

        Args:
            row: of the slab.
            source, source_row: where the tokens are.
            counts: [layers][H_kv] tokens held there.
            policy: the row's own.
            longest: tokens that its sequence may reach.
        """
        ...

    def move(self, row: int, source: int) -> None:
        """Let `row` be what the row `source` was."""
        ...

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Run one token of each of the first rows; evict what it displaces.

        Args:
            token_ids: [rows] the tokens.
            positions: [rows] where each stands in its sequence.

        Returns:
            [rows, vocab] logits in the model's dtype; valid until the next step.
        """
        ...


class SteppedDecoder:
    """Decodes by torch's operations, or on a processor by numba's programs."""

    def __init__(self, model: LoadedModel, slab: Slots, chosen: Carrier) -> None:
        self._model = model
        self._slab = slab
        self._chosen = chosen
        self._rows: dict[int, tuple[EffectivePolicy, int]] = {}
        """The policy of each row and the length that its sequence may reach."""
        self._batch: tuple[int, Steps] | None = None
        """How many rows decode, and their steps; None when rows have changed since then."""

    def join(
        self,
        row: int,
        source: Slots,
        source_row: int,
        counts: Heads,
        policy: EffectivePolicy,
        longest: int,
    ) -> None:
        """As `Decoder.join`."""
        self._slab.copy_row(row, source, source_row, counts)
        self._rows[row] = (policy, longest)
        self._batch = None

    def move(self, row: int, source: int) -> None:
        """As `Decoder.move`."""
        self._slab.move_row(row, source)
        self._rows[row] = self._rows[source]
        self._batch = None

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """As `Decoder.step`."""
        rows = len(token_ids)
        if self._batch is None or self._batch[0] != rows:
            policies, lengths = zip(*(self._rows[row] for row in range(rows)), strict=True)
            # No wider than the rows need: torch's operations go over all of a view's slots.
            slots = self._slab.view(slice(0, rows), most_of(policies))
            stacked = PolicyTensors.stack(policies, lengths, self._model.device)
            self._batch = rows, make_steps(self._chosen, slots, stacked)
        ids, start = torch.tensor([token_ids, positions], device=self._model.device)
        forward = self._batch[1](start)
        hidden = self._model.hidden_states(ids[:, None], start[:, None], forward)
        return self._model.logits(hidden[:, -1])


def most_of(policies: Sequence[EffectivePolicy]) -> Heads:
    """Return the largest budget among policies in each layer and head that this process holds."""
    layers = zip(*(policy.held_budgets for policy in policies), strict=True)
    return tuple(tuple(map(max, zip(*heads, strict=True))) for heads in layers)


def choose_kernels(asked: Kernels, model: LoadedModel) -> Carrier:
    """Return which kernels a model is served with, ready to run.

    `auto` takes Triton's or numba's where there is a program for the device, the dtype and the head
    size. The first program of a dtype on a machine takes seconds to compile.
    Raises InvalidArgument where `triton` or `numba` is asked for and there is none.
    """
    if asked == "torch":
        return "torch"
    problems: dict[Carrier, str | None] = {
        "triton": kernels.problem(model.device, model.dtype, model.shape.head_dim),
        "numba": kernels.processor_problem(model.device, model.dtype),
    }
    for carrier, problem in problems.items():
        if asked in ("auto", carrier) and problem is None:
            if carrier == "numba":
                from a2sf.kernels import walk

                walk.program(model.dtype)
            return carrier
    if asked == "auto":
        return "torch"
    raise InvalidArgument("kernels", f"{asked}, but {problems[asked]}; or take kernels torch")


def make_steps(chosen: Carrier, slots: Slots, policy: PolicyTensors) -> Steps:
    """Return what carries the rows of `slots` on through their layers, a token of each at a time.

    Triton's programs have a decoder of their own (`make`); beside it, torch's operations take
    their place.
    """
    if chosen == "numba":
        from a2sf.kernels import walk

        return walk.Walker(slots, policy).begin
    return partial(DecodePass, slots, policy)


def walk_texts(
    chosen: Carrier,
    slots: Slots,
    policy: PolicyTensors,
    projected: tuple[Tensor, Tensor, Tensor],
    scale: float,
    *,
    start: Tensor,
    end: Tensor,
    output: Tensor,
    watch: Kept | None,
) -> None:
    """Carry given tokens through one layer, one after the other.

    Args:
        chosen: what carries out the law.
        slots, policy: the rows, and their policies in the layer.
        projected: queries [rows, H_q, width, D], keys and values [rows, H_kv, width, D] of whole
            texts.
        scale: factor on the logits.
        start, end: [rows] int64: the first token of each text that goes through, and the first
            behind them that does not.
        output: [rows, H_q, width, D], to which the attention output of these tokens is written.
        watch: told what each query was given, or None.
    """
    if chosen == "numba":
        from a2sf.kernels import walk

        walker = walk.Walker(slots, policy)
        walker.begin_texts(start, end, watch.table if watch else None)
        walker.into(output, 0, *projected, scale)
        return
    if chosen == "triton":
        from a2sf.kernels import triton_walk

        triton_walk.walk(
            *projected,
            slots=triton_walk.HeadSlots.of(slots, 0),
            policy=policy,
            start=start,
            end=end,
            scale=scale,
            output=output,
            seen=watch.table if watch else None,
        )
        return
    rows = torch.arange(len(start), device=start.device)
    for ahead in range(int((end - start).max())):
        at = start + ahead
        # Rows that have ended run on, and what was said of their last token stays.
        index = at.clamp(max=output.shape[2] - 1)
        query, keys, values = (t[rows, :, index, None] for t in projected)
        found = DecodePass(slots, policy, at)(0, query, keys, values, scale)[:, :, 0]
        going = (at < end)[:, None, None]
        output[rows, :, index] = torch.where(going, found, output[rows, :, index])
        if watch:
            watch.step(at, slots)


def block_attention(chosen: Carrier) -> BlockAttention:
    """Return what attends in the blocks of prompts."""
    if chosen != "triton":
        return attend_and_charge
    # Here and elsewhere, because it brings Triton, which not every machine has, or numba, which
    # takes a moment to load.
    from a2sf.kernels import prefill

    return prefill.attend_and_charge


def make(model: LoadedModel, slab: Slots, chosen: Carrier, *, graphs: bool) -> Decoder:
    """Return what decodes a slab's rows; `graphs` asks for CUDA graphs of the Triton kernels."""
    if chosen != "triton":
        return SteppedDecoder(model, slab, chosen)
    from a2sf import fused

    return fused.FusedDecoder(model, slab, graphs=graphs)
