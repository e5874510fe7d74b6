"""One model, several processes: the first is asked, and all do the same at the same time.

Owns what keeps the ranks' engines in lockstep: the first rank's engine tells the others which
requests came and went since its last step and what its clock said, and each does that step on its
own heads. Knows nothing of transport, of how processes meet (`ranks`), or of what a step computes.
"""

import hashlib
import time
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from a2sf import sampling
from a2sf.admission import EngineConfig
from a2sf.engine import Engine
from a2sf.models import LoadedModel
from a2sf.ranks import RankLost, Ranks
from a2sf.requests import Delta, Failed, GenerationRequest, StepEvent
from a2sf.schema import Frozen


class _Submit(Frozen):
    kind: Literal["submit"] = "submit"
    request: GenerationRequest
    now: float
    """What the first rank's clock said, seconds."""


class _Cancel(Frozen):
    kind: Literal["cancel"] = "cancel"
    request_id: str


class _Step(Frozen):
    """What one step hangs on, but for what all ranks know already."""

    commands: tuple[Annotated[_Submit | _Cancel, Field(discriminator="kind")], ...]
    """Accepted by the first rank since the step before, in order."""
    now: float
    drawn: str
    """The digest of what the first rank drew in the step before, and of what failed there."""


_END = b""
"""What the first rank says last."""


class LeadingEngine(Engine):
    """The first rank's engine: the others follow what is asked of it.

    The other ranks must be in `Follower`. Bytes are those of all ranks together. CUDA graphs are
    left out, whatever the config says: sums over ranks have not been tried in them.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        ranks: Ranks,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ranks = ranks
        self._agreed = _AgreedClock(clock)
        self._commands: list[_Submit | _Cancel] = []
        self._drawn = _digest([])
        config = config.model_copy(update={"cuda_graphs": False})
        ranks.tell(config.model_dump_json().encode())
        super().__init__(model, config, clock=self._agreed)

    @property
    def kv_slab_bytes(self) -> int:
        """As in `Engine`, of all ranks: some hold wider heads than others."""
        identity = self.model.identity
        slots = self.config.head_slots(identity.num_layers, identity.num_kv_heads)
        return self.config.max_batch * sum(map(sum, slots)) * self._slot_bytes

    @property
    def kv_staging_bytes(self) -> int:
        """As in `Engine`."""
        return super().kv_staging_bytes * self._ranks.size

    def submit(self, request: GenerationRequest) -> None:
        """As `Engine.submit`."""
        # A seed that each rank chose for itself would be another one on each.
        seed = sampling.choose_seed(request.sampling)
        seeded = request.sampling.model_copy(update={"seed": seed})
        request = request.model_copy(update={"sampling": seeded})
        now = self._agreed.agree()
        super().submit(request)
        self._commands.append(_Submit(request=request, now=now))

    def cancel(self, request_id: str) -> None:
        """As `Engine.cancel`."""
        super().cancel(request_id)
        self._commands.append(_Cancel(request_id=request_id))

    def step(self) -> list[StepEvent]:
        """As `Engine.step`, on all ranks. Raises RankLost where one has ended."""
        told = _Step(commands=tuple(self._commands), now=self._agreed.agree(), drawn=self._drawn)
        self._ranks.tell(told.model_dump_json().encode())
        with self._ranks.together():
            events = super().step()
        self._commands.clear()
        self._drawn = _digest(events)
        return events

    def close(self) -> None:
        """Let the other ranks' engines end. This one is of no use afterwards."""
        self._ranks.tell(_END)


class Follower:
    """Any other rank: an engine that does what the first rank's does."""

    def __init__(self, model: LoadedModel, ranks: Ranks) -> None:
        """Wait for the first rank's engine, and make one like it. Raises RankLost if it ends."""
        self._ranks = ranks
        self._now = 0.0
        config = EngineConfig.model_validate_json(ranks.hear())
        self._engine = Engine(model, config, clock=lambda: self._now)

    def run(self) -> None:
        """Follow until the first rank closes.

        Raises RankLost where it ends without, and where it draws other tokens than this one or
        other requests fail there.
        """
        drawn = _digest([])
        while (message := self._ranks.hear()) != _END:
            told = _Step.model_validate_json(message)
            if told.drawn != drawn:
                raise RankLost(f"rank {self._ranks.rank} has drawn other tokens than the first")
            for command in told.commands:
                if isinstance(command, _Submit):
                    self._now = command.now
                    self._engine.submit(command.request)
                else:
                    self._engine.cancel(command.request_id)
            self._now = told.now
            with self._ranks.together():
                drawn = _digest(self._engine.step())


class _AgreedClock:
    """A clock of which one reading can be fixed before it is asked for.

    What a submission or a step decides hangs on the first time that it reads the clock; that is the
    one that other ranks are told. Later readings only time what was done.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next: float | None = None

    def agree(self) -> float:
        """Return what the next call will return, seconds."""
        self._next = self._clock()
        return self._next

    def __call__(self) -> float:
        agreed, self._next = self._next, None
        return self._clock() if agreed is None else agreed


def _digest(events: list[StepEvent]) -> str:
    """Tell what was drawn, and what failed, in few bytes, the same on every rank."""
    drawn = [(event.request_id, event.token_ids) for event in events if isinstance(event, Delta)]
    failed = [event.request_id for event in events if isinstance(event, Failed)]
    return hashlib.sha256(repr((drawn, failed)).encode()).hexdigest()
