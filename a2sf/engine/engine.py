"""The engine: a loop that admits requests, prefills, decodes and emits events.

Owns the slab of decode rows, the staging row for prefill, and the sequences in them. `step` is the
whole loop. Not thread-safe: one thread owns an engine. Knows nothing of transport. Scheduling never
changes what the law computes.

An error of one request ends only that request, with `Failed`. Only code that computes for all rows
together can end the engine: the decoder's step, and a prompt's forward pass if several processes
share the model. NaN or infinity in a request's logits is an error of that request, and never
reaches another one. When a request fails, its row is scrubbed. A row whose logits are finite needs
no scrub: every value in it was weighed into the logits, so all are finite.
"""

import time
from collections.abc import Callable

from torch import Tensor

from a2sf.cache.slots import SLOT_OVERHEAD_BYTES, Slots
from a2sf.engine import admission, decoding
from a2sf.engine.config import EngineConfig
from a2sf.engine.row_sampler import Drawn, RowSampler
from a2sf.engine.sequence import Sequence
from a2sf.engine.staging import BatchWide, Staging
from a2sf.errors import InvalidArgument, ResourceExhausted, raise_if_fatal
from a2sf.model.loader import LoadedModel
from a2sf.policy import Heads
from a2sf.requests import CacheStatistics, Event, Failed, GenerationRequest, StepEvent


class Engine:
    """Continuous batching over rows of constant size.

    Active rows are kept at the front of the slab without gaps, so a batch is a view: when a row
    ends, the last row moves into its place. `clock` returns seconds, for time limits and timings.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.config = config
        self._clock = clock
        self._token_bytes = 2 * model.shape.head_dim * model.dtype.itemsize
        """Bytes of one token's key and value in one head."""
        self._slot_bytes = self._token_bytes + SLOT_OVERHEAD_BYTES
        """Bytes of one slot in one head."""
        self.kernels = decoding.choose_kernels(config.kernels, model)
        """The chosen implementation of the law: torch, triton or numba."""
        slots = config.head_slots(model.shape.num_layers, model.identity.num_kv_heads)
        self._slab = self._allocate(config.max_batch, model.select_heads(slots))
        graphs = config.cuda_graphs and model.device.type == "cuda"
        self._decoder = decoding.make_decoder(model, self._slab, self.kernels, graphs=graphs)
        staging = config.staging_slots(model.shape.max_context)
        equal = ((staging,) * model.shape.num_kv_heads,) * model.shape.num_layers
        row = self._allocate(1, equal)
        self._staging = Staging(model, self.kernels, row, config.step_tokens)
        self._waiting: list[Sequence] = []
        self._prefilling: Sequence | None = None
        self._active: list[Sequence] = []
        """The sequence of each slab row in use, in row order."""
        self._sampler = RowSampler(model.device, self._fail)
        self._failures: list[Failed] = []
        """Failures that the current or next step will report."""

    @property
    def has_work(self) -> bool:
        """Whether there is anything to do in `step`."""
        return bool(self._waiting or self._prefilling or self._active or self._failures)

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
        """Bytes of the decode slab's tensors; constant."""
        return self._slab.nbytes

    @property
    def kv_staging_bytes(self) -> int:
        """Bytes of the staging row's tensors; constant."""
        return self._staging.row.nbytes

    @property
    def kv_bytes_used(self) -> int:
        """Bytes of the slots that hold tokens, for all running requests and the one in prefill.

        If several processes share the model, the sum over all processes.
        """
        # Copy the list first: another thread may call this while the engine's thread changes it.
        running = [*tuple(self._active), self._prefilling]
        stored = sum(sequence.num_stored for sequence in running if sequence is not None)
        return stored * self._slot_bytes

    def submit(self, request: GenerationRequest) -> None:
        """Check a request and queue it.

        Raises InvalidArgument, naming the field and the accepted range, if a value cannot be
        served, and ResourceExhausted if the queue is full.
        """
        policy = admission.check(request, self.model, self.config)
        names = [s.request.request_id for s in self._sequences()]
        if request.request_id in (*names, *(failed.request_id for failed in self._failures)):
            raise InvalidArgument("request_id", f"{request.request_id!r} is already in use")
        free = self.config.max_batch - self.running
        if len(self._waiting) >= free + self.config.max_waiting:
            raise ResourceExhausted(
                f"{self.running} requests run and {len(self._waiting)} wait; try again later"
            )
        self._waiting.append(Sequence.queued(request, policy, self.model, self._clock()))

    def cancel(self, request_id: str) -> None:
        """Drop a request and free its row at once, without an event. Ignores unknown ids."""
        self._failures = [one for one in self._failures if one.request_id != request_id]
        for sequence in self._sequences():
            if sequence.request.request_id == request_id:
                self._forget(sequence)
                break

    def step(self) -> list[StepEvent]:
        """Admit one request, decode one token of every row, prefill a piece of a prompt.

        First, requests past their time limit end with the tokens that they have. An exception in
        the work for one request becomes its `Failed` event, and its row is free after the step. An
        exception in the forward pass of all rows is raised; the engine cannot be used afterwards.
        """
        events: list[Event] = []
        self._end_overdue(events)
        self._admit(events)
        # Decode before the prefill: a row that joins in this step decodes from the next step on.
        for compute in (self._decode, self._prefill):
            logits = compute()
            if logits is not None:
                self._emit(self._sample(logits), events)
        failures, self._failures = self._failures, []
        return [*events, *failures]

    def _allocate(self, rows: int, slots: Heads) -> Slots:
        shape = self.model.shape
        return Slots.empty(
            rows=rows,
            slots=slots,
            head_dim=shape.head_dim,
            dtype=self.model.dtype,
            device=self.model.device,
        )

    def _sequences(self) -> list[Sequence]:
        prefilling = [self._prefilling] if self._prefilling else []
        return [*self._waiting, *prefilling, *self._active]

    def _admit(self, events: list[Event]) -> None:
        if self._prefilling or not self._waiting or len(self._active) >= self.config.max_batch:
            return
        # The oldest of those with the highest priority.
        sequence = self._prefilling = max(self._waiting, key=lambda s: s.request.priority)
        self._waiting.remove(sequence)
        try:
            sequence.prefill_at = self._clock()
            self._staging.clear()
            events.append(sequence.started())
        except BaseException as error:
            self._fail(sequence, error)
            self._forget(sequence)

    def _end_overdue(self, events: list[Event]) -> None:
        now = self._clock()
        for sequence in self._sequences():
            # It may have failed when another sequence ended and its row had to move.
            if sequence.failure is not None:
                continue
            last: list[Event] = []
            try:
                if not sequence.overdue(now):
                    continue
                if sequence in self._waiting:
                    last.append(sequence.started())
                last += sequence.time_out()
                last.append(sequence.finished(self._statistics(sequence), now))
                events += last
            except BaseException as error:
                self._fail(sequence, error)
            self._forget(sequence)

    def _decode(self) -> Tensor | None:
        """Decode one token of every active row; return their logits [rows, vocab]."""
        if not self._active:
            return None
        return self._decoder.step(
            [s.generated[-1] for s in self._active], [s.num_cached_tokens for s in self._active]
        )

    def _prefill(self) -> Tensor | None:
        """Run a piece of a prompt; after the last, give it a row and return logits [1, vocab]."""
        sequence = self._prefilling
        if sequence is None:
            return None
        try:
            logits = self._staging.read(sequence)
        except BatchWide as error:
            raise error.cause from None
        except BaseException as error:
            self._fail(sequence, error)
            self._forget(sequence)
            return None
        return logits if logits is not None and self._join(sequence) else None

    def _join(self, sequence: Sequence) -> bool:
        """Move a complete prompt to the first free row; return False if this fails."""
        row = len(self._active)
        try:
            slots = self._staging.finish(sequence)
            sequence.running = True
            stored = self.model.select_heads(sequence.stored)
            self._decoder.join(row, slots, 0, stored, sequence.policy, sequence.max_len)
        except BaseException as error:
            self._fail(sequence, error)
            self._forget(sequence)
            # The row may be partly written.
            self._slab.scrub(row)
            return False
        self._prefilling = None
        self._active.append(sequence)
        self._sampler.forget_batch()
        return True

    def _sample(self, logits: Tensor) -> list[Drawn | None]:
        """Draw from the logits of the last rows, [rows, vocab]; None for a row that failed."""
        sequences = self._active[-len(logits) :]
        all_rows = len(sequences) == len(self._active)
        return self._sampler.sample(sequences, logits, all_rows=all_rows)

    def _emit(self, drawn: list[Drawn | None], events: list[Event]) -> None:
        """Emit the tokens of the last rows; free the rows that end or fail."""
        first = len(self._active) - len(drawn)
        now = self._clock()
        for sequence, one in zip(self._active[first:], drawn, strict=True):
            if one is None:
                continue
            try:
                events.append(sequence.accept(one.token, one.logprobs, now))
                if sequence.reason is not None:
                    events.append(sequence.finished(self._statistics(sequence), now))
            except BaseException as error:
                self._fail(sequence, error)
        # In reverse, so that the row that moves into a freed one never has to be freed itself.
        for row in reversed(range(first, first + len(drawn))):
            if self._active[row].reason is not None or self._active[row].failure is not None:
                self._free(row)

    def _statistics(self, sequence: Sequence) -> CacheStatistics:
        return sequence.statistics(token_bytes=self._token_bytes, slot_bytes=self._slot_bytes)

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """Record that an error ended a sequence; the caller must still free its row."""
        raise_if_fatal(error)
        sequence.failure = error
        self._failures.append(Failed(request_id=sequence.request.request_id, error=error))

    def _forget(self, sequence: Sequence) -> None:
        """Remove a sequence from the queue, from prefill, or from its row."""
        if sequence is self._prefilling:
            self._prefilling = None
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._free(self._active.index(sequence))

    def _free(self, row: int) -> None:
        """Free `row` by moving the last row into it."""
        self._sampler.forget_batch()
        if self._active[row].failure is not None:
            self._slab.scrub(row)
        while (last := len(self._active) - 1) != row:
            moving = self._active[last]
            try:
                self._decoder.move(row, last)
            except BaseException as error:
                # It cannot stay, because rows have no gaps: try the row before it.
                self._fail(moving, error)
                self._active.pop()
                self._slab.scrub(last)
            else:
                self._active[row] = moving
                break
        self._active.pop()
