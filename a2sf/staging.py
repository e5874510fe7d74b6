"""Where prompts are read: one at a time, a piece a step, in a row outside the slab.

Owns that row: what the present prompt has written or blanked in it, and whether all that the model
made of the prompt was finite. Knows nothing of the rows that decode, nor of events.

Finite last logits do not prove that a prompt was finite all along: it may have evicted what was not
before its last token. So the final hidden states of all positions are looked at, and a prompt's
view never includes a slot that the prompt has neither written nor blanked.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from a2sf import decoding
from a2sf.attention import BlockPass, end_prompt
from a2sf.cache import PolicyTensors, Slots
from a2sf.errors import NonFinite
from a2sf.models import LayerAttention, LoadedModel
from a2sf.sequence import Sequence

NOT_FINITE = (
    "non-finite logits: the model gave NaN or infinity; where activations overflow in float16, "
    "bfloat16 or float32 helps"
)


class BatchWide(Exception):
    """What was raised where no single request can be blamed for it."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


@dataclass(frozen=True)
class Piece:
    """Some tokens of a prompt on their way through the model."""

    slots: Slots
    """Those that the prompt needs once they are placed."""
    policy: PolicyTensors
    ids: Tensor
    """[1, width] int64."""
    positions: Tensor
    """[1, width] int64."""
    forward: LayerAttention


class Staging:
    """The row of the prompt that is being read."""

    def __init__(
        self, model: LoadedModel, kernels: decoding.Carrier, row: Slots, step_tokens: int
    ) -> None:
        """Take a row of slots for prompts, of which a step computes at most `step_tokens`."""
        self.row = row
        self._model = model
        self._kernels = kernels
        self._block_attention = decoding.block_attention(kernels)
        self._step_tokens = step_tokens
        self._piece: Piece | None = None
        """What was read last."""
        self._known = 0
        """Slots that the prompt has written or blanked."""
        self._largest = torch.zeros((), device=model.device)
        """Largest magnitude in the final hidden states of the prompt so far; NaN wins."""

    def clear(self) -> None:
        """Forget the prompt before, for another one."""
        self.row.clear()
        self._piece = None
        self._known = 0
        self._largest.zero_()

    def read(self, sequence: Sequence) -> Tensor | None:
        """Run the next piece of a prompt; after the last one, return the logits [1, vocab].

        Raises BatchWide where the model's pass fails that several processes share.
        """
        piece = self._piece = self._lay_out(sequence)
        return self._run(sequence, piece)

    def finish(self, sequence: Sequence) -> Slots:
        """Trim a prompt that was read to its end; return what holds it.

        Raises NonFinite where NaN or infinity came up in it.
        """
        assert self._piece is not None, "nothing was read"
        if not math.isfinite(self._largest):
            raise NonFinite(NOT_FINITE)
        stored = self._integers(sequence.held)[:, None]
        length = self._integers([len(sequence.request.prompt_ids)])
        end_prompt(self._piece.slots, stored, length, self._piece.policy)
        return self._piece.slots

    def _lay_out(self, sequence: Sequence) -> Piece:
        """Say where the next piece goes, under which policy, and what the model needs for it."""
        prompt = sequence.request.prompt_ids
        first = sequence.prefilled
        start, length = sequence.block
        width = min(start + length - first, self._step_tokens)
        policy = PolicyTensors.stack([sequence.policy], [sequence.longest], self._model.device)
        # Slots fill in order until the first eviction, so none of those beyond is needed yet.
        most = sequence.policy.staging_slots(len(prompt))
        needed = min(most, first + width)
        if sequence.in_order:
            self._known = needed
        elif self._known < most:
            self.row.whole.blank(slice(self._known, most))
            self._known = most
        shape = self._model.shape
        every_head = ((needed,) * shape.num_kv_heads,) * shape.num_layers
        slots = self.row.view(slice(None), every_head)
        forward: LayerAttention
        # Blocks of one token are decode steps, which choose their slots in less time.
        if sequence.policy.prefill_chunk == 1:
            steps = decoding.make_steps(self._kernels, slots, policy)
            forward = steps(self._integers([first]))
        else:
            forward = BlockPass(
                slots,
                policy,
                start=self._integers([start]),
                lengths=self._integers([length]),
                used=self._integers(sequence.held)[:, None],
                width=width,
                first=first - start,
                in_order=sequence.in_order,
                attention=self._block_attention,
            )
        ids = self._integers([prompt[first : first + width]])
        positions = torch.arange(first, first + width, device=self._model.device)[None]
        return Piece(slots, policy, ids, positions, forward)

    def _run(self, sequence: Sequence, piece: Piece) -> Tensor | None:
        try:
            hidden = self._model.hidden_states(piece.ids, piece.positions, piece.forward)
            sequence.prefilled += piece.ids.shape[1]
            last = sequence.prefilled == len(sequence.request.prompt_ids)
            logits = self._model.logits(hidden[:, -1]) if last else None
        except Exception as error:
            if self._model.held is not None:
                # The other processes are still in the middle of this pass.
                raise BatchWide(error) from error
            raise
        torch.maximum(self._largest, hidden.abs().amax().float(), out=self._largest)
        return logits

    def _integers(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)
