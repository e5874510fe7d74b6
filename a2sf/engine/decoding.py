"""Decoding token by token, with the fastest implementation of the law.

Owns the choice between torch (any device), numba (`kernels.walk`, processors) and the Triton
kernels, for two jobs. Serving: one token of each row through the model, on GPUs in CUDA graphs
(`fused`). Teacher forcing: all tokens of given texts through one layer. Knows nothing of requests
or of when a row starts and ends.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from a2sf.cache import kernels
from a2sf.cache.attention import BlockAttention, attend_and_score
from a2sf.cache.passes import DecodePass
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.retention import RetentionRecorder
from a2sf.cache.slots import Slots
from a2sf.engine.config import Kernels
from a2sf.errors import InvalidArgument
from a2sf.model.layer_attention import LayerAttention
from a2sf.model.loader import LoadedModel
from a2sf.policy import EffectivePolicy, Heads

Backend = Literal["torch", "triton", "numba"]
"""An implementation of the law."""

Steps = Callable[[Tensor], LayerAttention]
"""Positions of the rows' next tokens, [rows] int64 -> the attention that runs these tokens."""


class Decoder(Protocol):
    """Decodes the first rows of a slab, and stores each row's policy."""

    def join(
        self,
        row: int,
        source: Slots,
        source_row: int,
        counts: Heads,
        policy: EffectivePolicy,
        max_len: int,
    ) -> None:
        """Copy a sequence from other slots to `row`, to decode it under a policy.

        Args:
            row: the row of the slab.
            source, source_row: the slots and the row that hold the sequence's tokens.
            counts: [layers][H_kv] tokens in each head there.
            policy: the sequence's policy.
            max_len: the most tokens that the sequence may reach.
        """
        ...

    def move(self, row: int, source: int) -> None:
        """Move the sequence of row `source` to `row`."""
        ...

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Decode one token of each of the first rows, with evictions.

        Args:
            token_ids: [rows] the tokens.
            positions: [rows] the position of each token in its sequence.

        Returns:
            [rows, vocab] logits in the model's dtype; valid until the next step.
        """
        ...


class SteppedDecoder:
    """Decodes with torch, or on a processor with numba."""

    def __init__(self, model: LoadedModel, slab: Slots, backend: Backend) -> None:
        self._model = model
        self._slab = slab
        self._backend = backend
        self._rows: dict[int, tuple[EffectivePolicy, int]] = {}
        """The policy of each row, and the most tokens that its sequence may reach."""
        self._batch: tuple[int, Steps] | None = None
        """The number of decoding rows and their steps; None after rows have changed."""

    def join(
        self,
        row: int,
        source: Slots,
        source_row: int,
        counts: Heads,
        policy: EffectivePolicy,
        max_len: int,
    ) -> None:
        """As `Decoder.join`."""
        self._slab.copy_row(row, source, source_row, counts)
        self._rows[row] = (policy, max_len)
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
            # As narrow as the rows allow: torch computes over all slots of a view.
            widest = self._model.select_heads(most_of(policies))
            slots = self._slab.view(slice(0, rows), widest)
            stacked = PolicyTensors.stack(policies, lengths, self._model.device, self._model.heads)
            self._batch = rows, make_steps(self._backend, slots, stacked)
        ids, start = torch.tensor([token_ids, positions], device=self._model.device)
        forward = self._batch[1](start)
        hidden = self._model.hidden_states(ids[:, None], start[:, None], forward)
        return self._model.logits(hidden[:, -1])


def most_of(policies: Sequence[EffectivePolicy]) -> Heads:
    """Return the largest budget of any policy, for each layer and head."""
    layers = zip(*(policy.head_budgets for policy in policies), strict=True)
    return tuple(tuple(map(max, zip(*heads, strict=True))) for heads in layers)


def choose_kernels(asked: Kernels, model: LoadedModel) -> Backend:
    """Choose the kernels for a model, and compile them if needed.

    `auto` takes triton or numba if it supports the device, the dtype and the head size. The first
    compilation for a dtype on a machine takes seconds.
    Raises InvalidArgument if `triton` or `numba` is asked for and cannot be used.
    """
    if asked == "torch":
        return "torch"
    problems: dict[Backend, str | None] = {
        "triton": kernels.problem(model.device, model.dtype, model.shape.head_dim),
        "numba": kernels.processor_problem(model.device, model.dtype),
    }
    for backend, problem in problems.items():
        if asked in ("auto", backend) and problem is None:
            if backend == "numba":
                from a2sf.cache.kernels import walk

                walk.program(model.dtype)
            return backend
    if asked == "auto":
        return "torch"
    raise InvalidArgument("kernels", f"{asked}, but {problems[asked]}; or take kernels torch")


def make_steps(backend: Backend, slots: Slots, policy: PolicyTensors) -> Steps:
    """Return the decode steps of the rows of `slots`, one token of each row per step.

    For triton this is torch's implementation: the Triton kernels decode in `FusedDecoder` only
    (see `make_decoder`).
    """
    if backend == "numba":
        from a2sf.cache.kernels import walk

        return walk.Walker(slots, policy).begin
    return partial(DecodePass, slots, policy)


def walk_texts(
    backend: Backend,
    slots: Slots,
    policy: PolicyTensors,
    projected: tuple[Tensor, Tensor, Tensor],
    scale: float,
    *,
    start: Tensor,
    end: Tensor,
    output: Tensor,
    recorder: RetentionRecorder | None,
) -> None:
    """Run given tokens through one layer, one after the other.

    Args:
        backend: the implementation of the law.
        slots, policy: the rows, and their policies in the layer.
        projected: queries [rows, H_q, width, D], keys and values [rows, H_kv, width, D] of whole
            texts.
        scale: factor on the logits.
        start, end: [rows] int64: the tokens start .. end - 1 of each text are run.
        output: [rows, H_q, width, D]; receives the attention output of these tokens.
        recorder: records which tokens each query could attend to, or None.
    """
    if backend == "numba":
        from a2sf.cache.kernels import walk

        walker = walk.Walker(slots, policy)
        walker.begin_texts(start, end, recorder.table if recorder else None)
        walker.into(output, 0, *projected, scale)
        return
    if backend == "triton":
        from a2sf.cache.kernels import triton_walk

        triton_walk.walk(
            *projected,
            slots=triton_walk.HeadSlots.of(slots, 0),
            policy=policy,
            start=start,
            end=end,
            scale=scale,
            output=output,
            visible=recorder.table if recorder else None,
        )
        return
    rows = torch.arange(len(start), device=start.device)
    for ahead in range(int((end - start).max())):
        at = start + ahead
        # Rows that have ended keep running, but their stored output does not change.
        index = at.clamp(max=output.shape[2] - 1)
        query, keys, values = (t[rows, :, index, None] for t in projected)
        found = DecodePass(slots, policy, at)(0, query, keys, values, scale)[:, :, 0]
        going = (at < end)[:, None, None]
        output[rows, :, index] = torch.where(going, found, output[rows, :, index])
        if recorder:
            recorder.step(at, slots)


def block_attention(backend: Backend) -> BlockAttention:
    """Return the block attention for prompts."""
    if backend != "triton":
        return attend_and_score
    # Kernels are imported where they are used: Triton may not be installed, and numba loads slowly.
    from a2sf.cache.kernels import prefill

    return prefill.attend_and_score


def make_decoder(model: LoadedModel, slab: Slots, backend: Backend, *, graphs: bool) -> Decoder:
    """Return the decoder of a slab's rows; `graphs` asks for CUDA graphs of the Triton kernels."""
    if backend != "triton":
        return SteppedDecoder(model, slab, backend)
    from a2sf.engine import cuda_graphs

    return cuda_graphs.FusedDecoder(model, slab, graphs=graphs)
