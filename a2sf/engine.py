"""Requests in, tokens out: the loop that admits, prefills, decodes and emits.

Owns the slab of decode rows, the staging row where a prompt is read, and the sequences in them. One
`step` is the whole story. Not thread-safe: one thread owns an engine. Knows nothing of transport;
what the law computes does not depend on how it schedules.

An error of one request ends that request with `Failed`, and no other. Only what computes for all
rows at once may end the engine: the decoder's step, and a prompt's forward pass where several
processes share the model. NaN and infinity count as errors of the request whose logits they are in,
and never reach another one. A row of the slab is scrubbed when its request fails: as long as logits
are finite, so are all values in the row, because each was weighed in them.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

from a2sf import admission, decoding, sampling
from a2sf.admission import EngineConfig
from a2sf.cache import SLOT_OVERHEAD_BYTES, Slots
from a2sf.errors import InvalidArgument, NonFinite, ResourceExhausted, raise_if_fatal
from a2sf.models import LoadedModel
from a2sf.policy import Heads, held_of
from a2sf.requests import (
    CacheStatistics,
    Event,
    Failed,
    GenerationRequest,
    StepEvent,
    TokenLogprobs,
)
from a2sf.sequence import Sequence
from a2sf.staging import NOT_FINITE, BatchWide, Staging

Result = TypeVar("Result")


class Engine:
    """Continuous batching over rows of constant size.

    Active rows stand compactly at the front of the slab, so a batch is a view of it: a row that
    ends is replaced by the last one. `clock` tells seconds, for time limits and timings.
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
        self.kernels = decoding.choose_kernels(config.kernels, model)
        """Which carry out the law: torch's operations, or Triton's or numba's programs."""
        slots = config.head_slots(model.shape.num_layers, model.identity.num_kv_heads)
        self._slab = self._allocate(config.max_batch, held_of(slots, model.held))
        graphs = config.cuda_graphs and model.device.type == "cuda"
        self._decoder = decoding.make(model, self._slab, self.kernels, graphs=graphs)
        staging = config.staging_slots(model.shape.max_context)
        equal = ((staging,) * model.shape.num_kv_heads,) * model.shape.num_layers
        row = self._allocate(1, equal)
        self._staging = Staging(model, self.kernels, row, config.step_tokens)
        self._waiting: list[Sequence] = []
        self._prefilling: Sequence | None = None
        self._active: list[Sequence] = []
        """The sequence of each slab row in use, in row order."""
        self._draws: sampling.Batch | None = None
        """The draws of the active rows; None when rows have changed since then."""
        self._failures: list[Failed] = []
        """What the next step, or the one under way, has to tell of requests that failed."""

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""
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
        """Bytes of the decode slab, read off the tensors; constant."""
        return self._slab.nbytes

    @property
    def kv_staging_bytes(self) -> int:
        """Bytes of the prefill staging row, read off the tensors; constant."""
        return self._staging.row.nbytes

    @property
    def kv_bytes_used(self) -> int:
        """Bytes of the slots that hold tokens, of running requests and of the one being read.

        Where several processes share the model, of all of them together.
        """
        # A copy in one go: another thread may ask while this one changes the list.
        running = [*tuple(self._active), self._prefilling]
        return sum(self._bytes_of(sequence) for sequence in running if sequence is not None)

    def submit(self, request: GenerationRequest) -> None:
        """Check a request and queue it.

        Raises InvalidArgument for a value that cannot be served, naming field and range, and
        ResourceExhausted when the queue is full.
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
        """Forget a request and free its row at once; unknown ids are ignored. No event follows."""
        self._failures = [one for one in self._failures if one.request_id != request_id]
        for sequence in self._sequences():
            if sequence.request.request_id == request_id:
                self._forget(sequence)
                break

    def step(self) -> list[StepEvent]:
        """Admit one request, decode one token of every row, prefill a piece of a prompt.

        Before that, requests whose time limit is over end with what they have. What is raised on
        behalf of one request becomes its `Failed`, and its row is free after the step. What is
        raised by the forward pass of all rows is raised here; the engine is of no use afterwards.
        """
        events: list[Event] = []
        self._end_overdue(events)
        self._admit(events)
        # First, for a row that joins in this step decodes from the next one on.
        if self._active:
            self._decode(events)
        if self._prefilling is not None:
            self._prefill(self._prefilling, events)
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
        # The first of those with the highest priority.
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
            # Its row may have been lost to another one's end.
            if sequence.failure is not None:
                continue
            last: list[Event] = []
            try:
                if not sequence.overdue(now):
                    continue
                if sequence in self._waiting:
                    last.append(sequence.started())
                withheld = sequence.time_out()
                if withheld is not None:
                    last.append(withheld)
                last.append(sequence.finished(self._statistics(sequence), now))
                events += last
            except BaseException as error:
                self._fail(sequence, error)
            self._forget(sequence)

    def _prefill(self, sequence: Sequence, events: list[Event]) -> None:
        """Run the next piece of a prompt; after its last one, give it a row and a first token."""
        try:
            logits = self._staging.read(sequence)
        except BatchWide as error:
            raise error.cause from None
        except BaseException as error:
            self._fail(sequence, error)
            self._forget(sequence)
            return
        if logits is None:
            return
        row = len(self._active)
        try:
            slots = self._staging.finish(sequence)
            sequence.running = True
            self._decoder.join(row, slots, 0, sequence.held, sequence.policy, sequence.longest)
        except BaseException as error:
            self._fail(sequence, error)
            self._forget(sequence)
            # Part of it may be there already.
            self._slab.scrub(row)
            return
        self._prefilling = None
        self._active.append(sequence)
        self._draws = None
        self._emit(row, logits, events)

    def _decode(self, events: list[Event]) -> None:
        logits = self._decoder.step(
            [s.generated[-1] for s in self._active], [s.seen for s in self._active]
        )
        self._emit(0, logits, events)

    def _emit(self, first: int, logits: Tensor, events: list[Event]) -> None:
        """Draw a token for each row of `logits` [rows, vocab], the row `first` and those after it.

        Reports the tokens, and frees the rows of sequences that end with theirs or fail.
        """
        rows = range(first, first + len(logits))
        sequences = self._active[first:]
        tokens = self._rowwise(sequences, lambda part: self._draw(sequences[part], logits[part]))
        for sequence, token in zip(sequences, tokens, strict=True):
            if token is None and sequence.failure is None:
                self._fail(sequence, NonFinite(NOT_FINITE))
        logprobs = self._logprobs(sequences, logits, tokens)
        now = self._clock()
        for sequence, token in zip(sequences, tokens, strict=True):
            if token is None or sequence.failure is not None:
                continue
            try:
                events.append(sequence.accept(token, logprobs.get(sequence), now))
                if sequence.reason is not None:
                    events.append(sequence.finished(self._statistics(sequence), now))
            except BaseException as error:
                self._fail(sequence, error)
        # From the back, so that the row that moves into a freed one is never itself to be freed.
        for row in reversed(rows):
            if self._active[row].reason is not None or self._active[row].failure is not None:
                self._free(row)

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> list[int | None]:
        if len(sequences) < len(self._active):
            return sampling.Batch([s.row for s in sequences], self.model.device).draw(logits)
        if self._draws is None:
            self._draws = sampling.Batch([s.row for s in sequences], self.model.device)
        return self._draws.draw(logits)

    def _logprobs(
        self, sequences: list[Sequence], logits: Tensor, tokens: list[int | None]
    ) -> dict[Sequence, TokenLogprobs]:
        asking = [
            (sequence, index, token)
            for index, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
            if token is not None and sequence.request.logprobs
        ]
        if not asking:
            return {}

        def find(part: slice) -> list[TokenLogprobs]:
            some, at, drawn = zip(*asking[part], strict=True)
            return sampling.logprobs(
                logits[list(at)], drawn, [one.request.top_logprobs for one in some]
            )

        asked = [sequence for sequence, _, _ in asking]
        found = zip(asked, self._rowwise(asked, find), strict=True)
        return {sequence: one for sequence, one in found if one is not None}

    def _rowwise(
        self, sequences: list[Sequence], work: Callable[[slice], Iterable[Result]]
    ) -> list[Result | None]:
        """Do for all sequences at once what each could do alone, and let those at fault fail.

        `work` returns a result for each sequence of a slice, the same whatever the slice. Only
        where it raises is it called for each sequence alone. A sequence that fails gets None.
        """
        try:
            return [*work(slice(0, len(sequences)))]
        except BaseException as error:
            raise_if_fatal(error)
        results: list[Result | None] = []
        for index, sequence in enumerate(sequences):
            try:
                results += work(slice(index, index + 1))
            except BaseException as error:
                self._fail(sequence, error)
                results.append(None)
        return results

    def _statistics(self, sequence: Sequence) -> CacheStatistics:
        identity = self.model.identity
        heads = identity.num_layers * identity.num_kv_heads
        kept_tokens = math.floor(sum(map(sum, sequence.stored)) / heads + 0.5)
        return CacheStatistics(
            budget=sequence.policy.budget,
            kept_tokens=kept_tokens,
            evicted_tokens=sequence.seen - kept_tokens,
            kv_bytes=self._bytes_of(sequence),
            kv_bytes_full=sequence.seen * heads * self._token_bytes,
        )

    def _bytes_of(self, sequence: Sequence) -> int:
        """Bytes of the slots that hold its tokens, in all processes together."""
        return sum(map(sum, sequence.stored)) * self._slot_bytes

    @property
    def _slot_bytes(self) -> int:
        """Bytes of one slot in one head."""
        return self._token_bytes + SLOT_OVERHEAD_BYTES

    @property
    def _token_bytes(self) -> int:
        """Bytes of one token's key and value in one head."""
        return 2 * self.model.shape.head_dim * self.model.dtype.itemsize

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """Note that an error has ended a sequence; whatever that holds is still to be freed."""
        raise_if_fatal(error)
        sequence.failure = error
        self._failures.append(Failed(request_id=sequence.request.request_id, error=error))

    def _forget(self, sequence: Sequence) -> None:
        """Take back the place of a sequence, wherever it is."""
        if sequence is self._prefilling:
            self._prefilling = None
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._free(self._active.index(sequence))

    def _free(self, row: int) -> None:
        """Let the last row move into `row`."""
        self._draws = None
        if self._active[row].failure is not None:
            self._slab.scrub(row)
        while (last := len(self._active) - 1) != row:
            moving = self._active[last]
            try:
                self._decoder.move(row, last)
            except BaseException as error:
                # It cannot stay where it is, because rows have no gaps: the one before it moves.
                self._fail(moving, error)
                self._active.pop()
                self._slab.scrub(last)
            else:
                self._active[row] = moving
                break
        self._active.pop()
