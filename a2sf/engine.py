"""Requests in, tokens out: the loop that admits, prefills, decodes and emits.

Owns the slab of decode rows, the staging row of the prompt being prefilled, and the sequences in
them. One `step` is the whole story. Not thread-safe: one thread owns an engine. Knows nothing of
transport; what the law computes does not depend on how it schedules.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from a2sf import admission, decoding, sampling
from a2sf.admission import EngineConfig
from a2sf.attention import BlockPass, end_prompt
from a2sf.cache import SLOT_OVERHEAD_BYTES, PolicyTensors, Slots
from a2sf.errors import InvalidArgument, ResourceExhausted
from a2sf.models import LayerAttention, LoadedModel
from a2sf.requests import CacheStatistics, Event, GenerationRequest, TokenLogprobs
from a2sf.sequence import Sequence


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
        layers = model.shape.num_layers
        self.kernels = decoding.choose_kernels(config.kernels, model)
        """Which carry out the law: torch's operations, or Triton's or numba's programs."""
        self._slab = self._allocate(config.max_batch, config.layer_slots(layers))
        graphs = config.cuda_graphs and model.device.type == "cuda"
        self._decoder = decoding.make(model, self._slab, self.kernels, graphs=graphs)
        self._block_attention = decoding.block_attention(self.kernels)
        staging = config.staging_slots(model.shape.max_context)
        self._staging = self._allocate(1, (staging,) * layers)
        self._waiting: list[Sequence] = []
        self._prefilling: Sequence | None = None
        self._active: list[Sequence] = []
        """The sequence of each slab row in use, in row order."""
        self._draws: sampling.Batch | None = None
        """The draws of the active rows; None when rows have changed since then."""

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

    @property
    def kv_bytes_used(self) -> int:
        """Bytes of the slots that hold tokens, of running requests and of the one being read."""
        # A copy in one go: another thread may ask while this one changes the list.
        running = [*tuple(self._active), self._prefilling]
        return sum(self._bytes_of(sequence) for sequence in running if sequence is not None)

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
        self._waiting.append(Sequence.queued(request, policy, self.model, self._clock()))

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its row at once; unknown ids are ignored. No event follows."""
        self._waiting = [s for s in self._waiting if s.request.request_id != request_id]
        if self._prefilling and self._prefilling.request.request_id == request_id:
            self._prefilling = None
        for row, sequence in enumerate(self._active):
            if sequence.request.request_id == request_id:
                self._free(row)
                break

    def step(self) -> list[Event]:
        """Admit one request, decode one token of every row, prefill a piece of a prompt.

        Before that, requests whose time limit is over end with what they have.
        """
        events: list[Event] = []
        self._end_overdue(events)
        self._admit(events)
        # First, for a row that joins in this step decodes from the next one on.
        if self._active:
            self._decode(events)
        if self._prefilling is not None:
            self._prefill(self._prefilling, events)
        return events

    def _allocate(self, rows: int, slots: tuple[int, ...]) -> Slots:
        shape = self.model.shape
        return Slots.empty(
            rows=rows,
            num_kv_heads=shape.num_kv_heads,
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
        sequence.prefill_at = self._clock()
        self._staging.clear()
        events.append(sequence.started())

    def _end_overdue(self, events: list[Event]) -> None:
        now = self._clock()
        for sequence in [s for s in self._sequences() if s.overdue(now)]:
            if sequence in self._waiting:
                events.append(sequence.started())
            withheld = sequence.time_out()
            if withheld is not None:
                events.append(withheld)
            events.append(sequence.finished(self._statistics(sequence), now))
            self.cancel(sequence.request.request_id)

    def _prefill(self, sequence: Sequence, events: list[Event]) -> None:
        """Run the next piece of a prompt; after its last one, give it a row and a first token."""
        prompt = sequence.request.prompt_ids
        first = sequence.prefilled
        start, length = sequence.block
        piece = min(start + length - first, self.config.step_tokens)
        policy = self._policies([sequence])
        # Slots fill in order until the first eviction, so none of those beyond is needed yet.
        needed = min(sequence.policy.staging_slots(len(prompt)), first + piece)
        slots = self._staging.view(slice(None), (needed,) * self.model.shape.num_layers)
        forward: LayerAttention
        # Blocks of one token are decode steps, which choose their slots in less time.
        if sequence.policy.prefill_chunk == 1:
            steps = decoding.make_steps(self.kernels, slots, policy)
            forward = steps(self._integers([first]))
        else:
            forward = BlockPass(
                slots,
                policy,
                start=self._integers([start]),
                lengths=self._integers([length]),
                used=self._integers(sequence.stored)[:, None],
                width=piece,
                first=first - start,
                in_order=sequence.in_order,
                attention=self._block_attention,
            )
        ids = self._integers([prompt[first : first + piece]])
        positions = torch.arange(first, first + piece, device=self.model.device)[None]
        hidden = self.model.hidden_states(ids, positions, forward)
        sequence.prefilled += piece
        if sequence.prefilled < len(prompt):
            return
        stored = self._integers(sequence.stored)[:, None]
        end_prompt(slots, stored, self._integers([len(prompt)]), policy)
        row = len(self._active)
        self._prefilling = None
        self._active.append(sequence)
        self._draws = None
        sequence.running = True
        self._decoder.join(row, slots, 0, sequence.stored, sequence.policy, sequence.longest)
        draws = sampling.Batch([sequence.row], self.model.device)
        self._emit(row, draws, self.model.logits(hidden[:, -1]), events)

    def _decode(self, events: list[Event]) -> None:
        if self._draws is None:
            self._draws = sampling.Batch([s.row for s in self._active], self.model.device)
        logits = self._decoder.step(
            [s.generated[-1] for s in self._active], [s.seen for s in self._active]
        )
        self._emit(0, self._draws, logits, events)

    def _emit(self, first: int, draws: sampling.Batch, logits: Tensor, events: list[Event]) -> None:
        """Draw a token for each row of `logits` [rows, vocab], the row `first` and those after it.

        Reports the tokens, and frees the rows of sequences that end with theirs.
        """
        rows = range(first, first + len(logits))
        tokens = draws.draw(logits)
        logprobs = self._logprobs(first, logits, tokens)
        now = self._clock()
        for row, token in zip(rows, tokens, strict=True):
            sequence = self._active[row]
            events.append(sequence.accept(token, logprobs.get(row), now))
            if sequence.reason is not None:
                events.append(sequence.finished(self._statistics(sequence), now))
        # From the back, so that the row that moves into a freed one is never itself to be freed.
        for row in reversed(rows):
            if self._active[row].reason is not None:
                self._free(row)

    def _logprobs(self, first: int, logits: Tensor, tokens: list[int]) -> dict[int, TokenLogprobs]:
        requests = [s.request for s in self._active[first : first + len(tokens)]]
        asking = [i for i, request in enumerate(requests) if request.logprobs]
        if not asking:
            return {}
        found = sampling.logprobs(
            logits[asking], [tokens[i] for i in asking], [requests[i].top_logprobs for i in asking]
        )
        return {first + i: one for i, one in zip(asking, found, strict=True)}

    def _statistics(self, sequence: Sequence) -> CacheStatistics:
        shape = self.model.shape
        kept_tokens = math.floor(sum(sequence.stored) / shape.num_layers + 0.5)
        return CacheStatistics(
            budget=sequence.policy.budget,
            kept_tokens=kept_tokens,
            evicted_tokens=sequence.seen - kept_tokens,
            kv_bytes=self._bytes_of(sequence),
            kv_bytes_full=sequence.seen
            * (shape.num_layers * shape.num_kv_heads * self._token_bytes),
        )

    def _bytes_of(self, sequence: Sequence) -> int:
        slot = self.model.shape.num_kv_heads * (self._token_bytes + SLOT_OVERHEAD_BYTES)
        return sum(sequence.stored) * slot

    @property
    def _token_bytes(self) -> int:
        """Bytes of one token's key and value in one head."""
        return 2 * self.model.shape.head_dim * self.model.dtype.itemsize

    def _free(self, row: int) -> None:
        last = len(self._active) - 1
        if row != last:
            self._active[row] = self._active[last]
            self._decoder.move(row, last, self._active[row].stored)
        self._active.pop()
        self._draws = None

    def _policies(self, sequences: list[Sequence]) -> PolicyTensors:
        return PolicyTensors.stack(
            [s.policy for s in sequences], [s.longest for s in sequences], self.model.device
        )

    def _integers(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)
