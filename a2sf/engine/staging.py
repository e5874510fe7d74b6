"""Prefill: one prompt at a time, one piece per step, in a staging row outside the slab.

Owns the staging row: which slots the current prompt has written or blanked, and whether all hidden
states of the prompt were finite. Knows nothing of the decode rows or of events.

Finite logits at the last token do not prove that the whole prompt was finite: values that are not
finite may have been evicted earlier. So we check the final hidden states of all positions. A
prompt's view never includes a slot that it has neither written nor blanked.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from a2sf.cache.passes import BlockPass, end_prompt
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots
from a2sf.engine import decoding
from a2sf.engine.sequence import Sequence
from a2sf.errors import NonFinite
from a2sf.model.layer_attention import LayerAttention
from a2sf.model.loader import LoadedModel

NOT_FINITE = (
    "non-finite logits: the model gave NaN or infinity; where activations overflow in float16, "
    "bfloat16 or float32 helps"
)


class BatchWide(Exception):
    """An error that no single request caused."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt, with the inputs of its forward pass."""

    slots: Slots
    """The slots that the prompt needs after this piece."""
    policy: PolicyTensors
    ids: Tensor
    """[1, width] int64."""
    positions: Tensor
    """[1, width] int64."""
    forward: LayerAttention


class Staging:
    """The staging row, with the prompt in prefill."""

    def __init__(
        self, model: LoadedModel, kernels: decoding.Backend, row: Slots, step_tokens: int
    ) -> None:
        """`row` holds the prompt's slots; a step computes at most `step_tokens` tokens."""
        self.row = row
        self._model = model
        self._kernels = kernels
        self._block_attention = decoding.block_attention(kernels)
        self._step_tokens = step_tokens
        self._piece: Piece | None = None
        """The last piece."""
        self._known = 0
        """Number of first slots that the prompt has written or blanked."""
        self._largest = torch.zeros((), device=model.device)
        """Largest magnitude in the prompt's final hidden states so far; NaN if any is NaN."""

    def clear(self) -> None:
        """Empty the row for the next prompt."""
        self.row.clear()
        self._piece = None
        self._known = 0
        self._largest.zero_()

    def read(self, sequence: Sequence) -> Tensor | None:
        """Run the next piece of a prompt; after the last one, return the logits [1, vocab].

        Raises BatchWide if the forward pass fails and several processes share the model.
        """
        piece = self._piece = self._lay_out(sequence)
        return self._run(sequence, piece)

    def finish(self, sequence: Sequence) -> Slots:
        """Trim a complete prompt to its budget; return its slots.

        Raises NonFinite if a hidden state was NaN or infinity.
        """
        assert self._piece is not None, "nothing was read"
        if not math.isfinite(self._largest):
            raise NonFinite(NOT_FINITE)
        stored = self._stored(sequence)
        length = self._integers([len(sequence.request.prompt_ids)])
        end_prompt(self._piece.slots, stored, length, self._piece.policy)
        return self._piece.slots

    def _lay_out(self, sequence: Sequence) -> Piece:
        """Prepare the next piece: its slots, its policy and the inputs of the forward pass."""
        prompt = sequence.request.prompt_ids
        first = sequence.prefilled
        start, length = sequence.block
        width = min(start + length - first, self._step_tokens)
        policy = PolicyTensors.stack(
            [sequence.policy], [sequence.max_len], self._model.device, self._model.heads
        )
        # Slots fill in order until the first eviction, so later slots are not needed yet.
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
        # A block of one token equals a decode step, which is faster.
        if sequence.policy.prefill_chunk == 1:
            steps = decoding.make_steps(self._kernels, slots, policy)
            forward = steps(self._integers([first]))
        else:
            forward = BlockPass(
                slots,
                policy,
                start=self._integers([start]),
                lengths=self._integers([length]),
                used=self._stored(sequence),
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
            if self._model.local_heads is not None:
                # The other processes are still in this forward pass.
                raise BatchWide(error) from error
            raise
        torch.maximum(self._largest, hidden.abs().amax().float(), out=self._largest)
        return logits

    def _stored(self, sequence: Sequence) -> Tensor:
        """Return the tokens stored in each head of this process, [layers, 1, H_kv]."""
        return self._integers(self._model.select_heads(sequence.stored))[:, None]

    def _integers(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)
