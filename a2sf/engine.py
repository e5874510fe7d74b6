"""Requests in, tokens out: the loop that admits, prefills, decodes and emits.

Owns the slab of decode rows, the staging row of the prompt being prefilled, and the sequences in
them. One `step` is the whole story. Not thread-safe: one thread owns an engine. Knows nothing of
transport; what the law computes does not depend on how it schedules.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from a2sf import admission, attention, sampling
from a2sf.admission import EngineConfig
from a2sf.attention import Block
from a2sf.cache import PolicyTensors, SlotCache
from a2sf.errors import InvalidArgument, ResourceExhausted
from a2sf.models import LoadedModel
from a2sf.policy import EffectivePolicy
from a2sf.requests import (
    CacheStatistics,
    Delta,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Started,
    Timings,
    Usage,
)
from a2sf.text import TextStream


@dataclass(eq=False)
class _Sequence:
    """One request on its way through the engine."""

    request: GenerationRequest
    policy: EffectivePolicy
    seed: int
    noise: torch.Generator
    text: TextStream
    submitted_at: float
    prefill_at: float = 0.0
    first_token_at: float = 0.0
    prefilled: int = 0
    """Prompt tokens in the cache so far."""
    generated: list[int] = field(default_factory=list)

    @property
    def seen(self) -> int:
        """Tokens that have entered the cache: the position of the next one."""
        # The newest token has been drawn but not yet run through the model.
        return self.prefilled + max(len(self.generated) - 1, 0)


class Engine:
    """Continuous batching over rows of constant size.

    Active rows stand compactly at the front of the slab, so a batch is a view of it: a row that
    ends is replaced by the last one.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model = model
        self.config = config
        self._slab = self._allocate(config.max_batch, config.slots)
        self._staging = self._allocate(1, config.staging_slots(model.shape.max_context))
        self._waiting: deque[_Sequence] = deque()
        self._prefilling: _Sequence | None = None
        self._active: list[_Sequence] = []
        """The sequence of each slab row in use, in row order."""
        self._policies: PolicyTensors | None = None
        """The active rows' policies; None when rows have changed since it was made."""

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""
        return bool(self._waiting or self._prefilling or self._active)

    @property
    def running(self) -> int:
        """Requests that hold a row or are being prefilled."""
        return len(self._active) + (self._prefilling is not None)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def kv_slab_bytes(self) -> int:
        """Bytes of the decode slab, read off the tensors; constant."""
        return self._slab.nbytes

    @property
    def kv_staging_bytes(self) -> int:
        """Bytes of the prefill staging row, read off the tensors; constant."""
        return self._staging.nbytes

    def submit(self, request: GenerationRequest) -> None:
        """Check a request and queue it.

        Raises InvalidArgument for a value that cannot be served, naming field and range, and
        ResourceExhausted when the queue is full.
        """
        policy = admission.check(request, self.model, self.config)
        if any(s.request.request_id == request.request_id for s in self._sequences()):
            raise InvalidArgument("request_id", f"{request.request_id!r} is already in use")
        free = self.config.max_batch - self.running
        if len(self._waiting) >= free + self.config.max_waiting:
            raise ResourceExhausted(
                f"{self.running} requests run and {len(self._waiting)} wait; try again later"
            )
        seed = sampling.choose_seed(request.sampling)
        self._waiting.append(
            _Sequence(
                request=request,
                policy=policy,
                seed=seed,
                noise=sampling.generator(seed),
                text=TextStream(self.model.tokenizer, request.prompt_ids, request.stop),
                submitted_at=time.monotonic(),
            )
        )

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its row at once; unknown ids are ignored. No event follows."""
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)
        if self._prefilling and self._prefilling.request.request_id == request_id:
            self._prefilling = None
        for row, sequence in enumerate(self._active):
            if sequence.request.request_id == request_id:
                self._free(row)
                break

    def step(self) -> list[Event]:
        """Admit one request, prefill one block of its prompt, decode one token of every row."""
        events: list[Event] = []
        self._admit(events)
        # A row that joins in this step decodes from the next one on.
        rows = len(self._active)
        if self._prefilling is not None:
            self._prefill_block(self._prefilling, events)
        if rows:
            self._decode(rows, events)
        return events

    def _allocate(self, rows: int, slots: int) -> SlotCache:
        shape = self.model.shape
        return SlotCache(
            num_layers=shape.num_layers,
            rows=rows,
            num_kv_heads=shape.num_kv_heads,
            slots=slots,
            head_dim=shape.head_dim,
            dtype=self.model.dtype,
            device=self.model.device,
        )

    def _sequences(self) -> list[_Sequence]:
        prefilling = [self._prefilling] if self._prefilling else []
        return [*self._waiting, *prefilling, *self._active]

    def _admit(self, events: list[Event]) -> None:
        if self._prefilling or not self._waiting or len(self._active) >= self.config.max_batch:
            return
        sequence = self._prefilling = self._waiting.popleft()
        sequence.prefill_at = time.monotonic()
        self._staging.clear(0)
        events.append(
            Started(
                request_id=sequence.request.request_id,
                policy=sequence.policy,
                prompt_tokens=len(sequence.request.prompt_ids),
                seed=sequence.seed,
            )
        )

    def _prefill_block(self, sequence: _Sequence, events: list[Event]) -> None:
        prompt = sequence.request.prompt_ids
        start = sequence.prefilled
        end = min(start + (sequence.policy.prefill_chunk or len(prompt)), len(prompt))
        policies = PolicyTensors.stack([sequence.policy], self.model.device)
        step = Block(
            start=self._integers([start]),
            lengths=self._integers([end - start]),
            used=self._staging.used,
            policy=policies,
        )
        slots = sequence.policy.staging_slots(len(prompt))
        views = [layer.view(slice(None), slots) for layer in self._staging.layers]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return attention.block(views[layer], layer, step, q, k, v, scale)

        ids = self._integers([prompt[start:end]])
        positions = torch.arange(start, end, device=self.model.device)[None]
        hidden = self.model.hidden_states(ids, positions, attend)
        self._staging.used.copy_(step.used_after)
        sequence.prefilled = end
        if end < len(prompt):
            return
        length = self._integers([end])
        used = self._staging.used
        kept = [attention.end_prompt(view, used, length, policies) for view in views]
        used.copy_(kept[0])
        row = len(self._active)
        self._slab.copy_row(row, self._staging, 0, min(slots, sequence.policy.budget))
        self._prefilling = None
        self._active.append(sequence)
        self._policies = None
        logits = self.model.logits(hidden[0, -1])
        if self._emit(row, logits, events):
            self._free(row)

    def _decode(self, rows: int, events: list[Event]) -> None:
        active = self._active[:rows]
        if self._policies is None or len(self._policies.budget) != rows:
            self._policies = PolicyTensors.stack([s.policy for s in active], self.model.device)
        used = self._slab.used[:rows]
        start = self._integers([s.seen for s in active])
        step = Block(start=start, lengths=torch.ones_like(start), used=used, policy=self._policies)
        width = max(s.policy.budget for s in active)
        views = [layer.view(slice(0, rows), width) for layer in self._slab.layers]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return attention.decode(views[layer], layer, step, q, k, v, scale)

        ids = self._integers([[s.generated[-1]] for s in active])
        hidden = self.model.hidden_states(ids, start[:, None], attend)
        used.copy_(step.used_after)
        logits = self.model.logits(hidden[:, -1])
        ended = [row for row in range(rows) if self._emit(row, logits[row], events)]
        # From the back, so that the row that moves into a freed one is never itself to be freed.
        for row in reversed(ended):
            self._free(row)

    def _emit(self, row: int, logits: Tensor, events: list[Event]) -> bool:
        """Draw the row's next token and report it; return whether the sequence has ended."""
        sequence = self._active[row]
        request = sequence.request
        token = sampling.draw(logits, request.sampling, sequence.noise)
        now = time.monotonic()
        if not sequence.generated:
            sequence.first_token_at = now
        sequence.generated.append(token)
        reason: FinishReason | None = None
        text = ""
        if token in self.model.eos_token_ids and not request.ignore_eos:
            reason = FinishReason.END_OF_SEQUENCE
        elif token in request.stop_token_ids:
            reason = FinishReason.STOP
        else:
            text = sequence.text.push(token)
            if sequence.text.matched is not None:
                reason = FinishReason.STOP
            elif len(sequence.generated) >= request.max_new_tokens:
                reason = FinishReason.LENGTH
        if reason is not None:
            text += sequence.text.flush()
            if sequence.text.matched is not None:
                # The last, withheld characters completed a stop string.
                reason = FinishReason.STOP
        events.append(Delta(request_id=request.request_id, text=text, token_ids=(token,)))
        if reason is None:
            return False
        events.append(self._finished(row, sequence, reason, now))
        return True

    def _finished(
        self, row: int, sequence: _Sequence, reason: FinishReason, now: float
    ) -> Finished:
        used = int(self._slab.used[row])
        shape = self.model.shape
        token_bytes = 2 * shape.head_dim * self.model.dtype.itemsize
        return Finished(
            request_id=sequence.request.request_id,
            reason=reason,
            matched_stop=sequence.text.matched,
            usage=Usage(
                prompt_tokens=len(sequence.request.prompt_ids),
                completion_tokens=len(sequence.generated),
            ),
            cache=CacheStatistics(
                budget=sequence.policy.budget,
                kept_tokens=used,
                evicted_tokens=sequence.seen - used,
                kv_bytes=self._slab.row_nbytes(used),
                kv_bytes_full=sequence.seen * shape.num_layers * shape.num_kv_heads * token_bytes,
            ),
            timings=Timings(
                queue_s=sequence.prefill_at - sequence.submitted_at,
                prefill_s=sequence.first_token_at - sequence.prefill_at,
                decode_s=now - sequence.first_token_at,
            ),
        )

    def _free(self, row: int) -> None:
        last = len(self._active) - 1
        if row != last:
            self._active[row] = self._active[last]
            self._slab.copy_row(row, self._slab, last, self._active[row].policy.budget)
        self._active.pop()
        self._policies = None

    def _integers(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)
