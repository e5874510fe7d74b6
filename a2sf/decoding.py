"""The rows that decode together: one token of each through the model.

Owns the choice between torch's operations, on any device, and the Triton kernels with CUDA graphs
(`fused`), for rows that go through a model token by token and for those that go through one layer
at a time. Knows nothing of requests or of when a row begins and ends.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from a2sf import kernels
from a2sf.attention import BlockAttention, DecodePass, attend_and_charge
from a2sf.cache import PolicyTensors, Slots
from a2sf.errors import InvalidArgument
from a2sf.models import LoadedModel
from a2sf.policy import EffectivePolicy

Kernels = Literal["auto", "torch", "triton"]
"""What may be asked for."""

Carrier = Literal["torch", "triton"]
"""What carries out the law."""


class Decoder(Protocol):
    """Runs the first rows of a slab, and remembers what each needs beside its slots."""

    def join(
        self,
        row: int,
        source: Slots,
        source_row: int,
        counts: Sequence[int],
        policy: EffectivePolicy,
        longest: int,
    ) -> None:
        """Let `row` hold what `source_row` of other slots holds, and decode under a policy.

        Args:
            row: of the slab.
            source, source_row: where the tokens are.
            counts: [layers] tokens held there.
            policy: the row's own.
            longest: tokens that its sequence may reach.
        """
        ...

    def move(self, row: int, source: int, counts: Sequence[int]) -> None:
        """Let `row` be what the row `source` was; `counts` [layers] tokens are held there."""
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


class LayerSteps(Protocol):
    """Carries rows through one layer, a token of each at a time."""

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, start: Tensor, /
    ) -> Tensor:
        """Place, attend and accumulate.

        Args:
            query: [rows, H_q, 1, D], rotated.
            keys, values: [rows, H_kv, 1, D], likewise.
            scale: factor on the logits.
            start: [rows] int64, the position of each row's token: one more than in the call before.

        Returns:
            The attention output, [rows, H_q, 1, D].
        """
        ...


class TorchDecoder:
    """Decodes by torch's operations, on any device and in any dtype."""

    def __init__(self, model: LoadedModel, slab: Slots) -> None:
        self._model = model
        self._slab = slab
        self._rows: dict[int, tuple[EffectivePolicy, int]] = {}
        """The policy of each row and the length that its sequence may reach."""
        self._batch: tuple[Slots, PolicyTensors] | None = None
        """The rows' slots and policies; None when rows have changed since then."""

    def join(
        self,
        row: int,
        source: Slots,
        source_row: int,
        counts: Sequence[int],
        policy: EffectivePolicy,
        longest: int,
    ) -> None:
        """As `Decoder.join`."""
        self._slab.copy_row(row, source, source_row, counts)
        self._rows[row] = (policy, longest)
        self._batch = None

    def move(self, row: int, source: int, counts: Sequence[int]) -> None:
        """As `Decoder.move`."""
        self.join(row, self._slab, source, counts, *self._rows[source])

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """As `Decoder.step`."""
        rows = len(token_ids)
        if self._batch is None or len(self._batch[1].sinks) != rows:
            policies, lengths = zip(*(self._rows[row] for row in range(rows)), strict=True)
            # No wider than the rows need: every operation goes over all of a view's slots.
            budgets = zip(*(policy.layer_budgets for policy in policies), strict=True)
            slots = self._slab.view(slice(0, rows), [max(mine) for mine in budgets])
            self._batch = (slots, PolicyTensors.stack(policies, lengths, self._model.device))
        ids, start = torch.tensor([token_ids, positions], device=self._model.device)
        forward = DecodePass(*self._batch, start)
        hidden = self._model.hidden_states(ids[:, None], start[:, None], forward)
        return self._model.logits(hidden[:, -1])


def choose_kernels(asked: Kernels, model: LoadedModel) -> Carrier:
    """Return which kernels a model is served with.

    `auto` takes Triton's where there is a program for the device, the dtype and the head size.
    Raises InvalidArgument where `triton` is asked for and there is none.
    """
    if asked == "torch":
        return "torch"
    problem = kernels.problem(model.device, model.dtype, model.shape.head_dim)
    if problem is None:
        return "triton"
    if asked == "auto":
        return "torch"
    raise InvalidArgument("kernels", f"triton, but {problem}; or take kernels torch")


def layer_steps(chosen: Carrier, slots: Slots, policy: PolicyTensors) -> LayerSteps:
    """Return what carries the rows of a layer's `slots` on, under policies of the same layer."""
    if chosen == "triton":
        from a2sf import fused

        return fused.FusedLayerSteps(slots, policy)
    return lambda query, keys, values, scale, start: DecodePass(slots, policy, start)(
        0, query, keys, values, scale
    )


def block_attention(chosen: Carrier) -> BlockAttention:
    """Return what attends in the blocks of prompts."""
    if chosen == "torch":
        return attend_and_charge
    # Here and below, because they bring Triton, which not every machine has.
    from a2sf.kernels import prefill

    return prefill.attend_and_charge


def make(model: LoadedModel, slab: Slots, chosen: Carrier, *, graphs: bool) -> Decoder:
    """Return what decodes a slab's rows; `graphs` asks for CUDA graphs of the Triton kernels."""
    if chosen == "torch":
        return TorchDecoder(model, slab)
    from a2sf import fused

    return fused.FusedDecoder(model, slab, graphs=graphs)
