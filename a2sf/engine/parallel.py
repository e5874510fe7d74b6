"""Engines of several processes that share one model and run in lockstep.

Owns the protocol. Before each step, the first rank's engine sends the others the requests submitted
and cancelled since the last step, and its clock's time. Then each rank runs the step on its own
heads. Knows nothing of transport, of process groups (`ranks`), or of what a step computes.
"""

import hashlib
import time
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from a2sf.engine import sampling
from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.model.loader import LoadedModel
from a2sf.model.tensor_parallel import RankLost, Ranks
from a2sf.requests import Delta, Failed, GenerationRequest, StepEvent
from a2sf.schema import Frozen


class _Submit(Frozen):
    kind: Literal["submit"] = "submit"
    request: GenerationRequest
    now: float
    """The time on the first rank's clock, in seconds."""


class _Cancel(Frozen):
    kind: Literal["cancel"] = "cancel"
    request_id: str


class _Step(Frozen):
    """The inputs of one step that the other ranks do not have yet."""

    commands: tuple[Annotated[_Submit | _Cancel, Field(discriminator="kind")], ...]
    """Commands that the first rank accepted since the previous step, in order."""
    now: float
    drawn: str
    """Digest of the tokens and failures of the first rank's previous step."""


_END = b""
"""The last message of the first rank."""


class LeadingEngine(Engine):
    """The first rank's engine; the other ranks' engines follow it.

    The other ranks must run a `Follower`. Numbers of bytes are sums over all ranks. CUDA graphs are
    never used, because we have not tested sums over ranks in them.
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
        ranks.send(config.model_dump_json().encode())
        super().__init__(model, config, clock=self._agreed)

    @property
    def kv_slab_bytes(self) -> int:
        """As in `Engine`, summed over ranks, whose heads may have different numbers of slots."""
        identity = self.model.identity
        slots = self.config.head_slots(identity.num_layers, identity.num_kv_heads)
        return self.config.max_batch * sum(map(sum, slots)) * self._slot_bytes

    @property
    def kv_staging_bytes(self) -> int:
        """As in `Engine`."""
        return super().kv_staging_bytes * self._ranks.size

    def submit(self, request: GenerationRequest) -> None:
        """As `Engine.submit`."""
        # All ranks must use the same seed, so the first rank chooses it.
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
        """As `Engine.step`, on all ranks. Raises RankLost if a rank has ended."""
        step = _Step(commands=tuple(self._commands), now=self._agreed.agree(), drawn=self._drawn)
        self._ranks.send(step.model_dump_json().encode())
        with self._ranks.together():
            events = super().step()
        self._commands.clear()
        self._drawn = _digest(events)
        return events

    def close(self) -> None:
        """End the other ranks' engines. This engine cannot be used afterwards."""
        self._ranks.send(_END)


class Follower:
    """The engine of another rank; it repeats the steps of the first rank's engine."""

    def __init__(self, model: LoadedModel, ranks: Ranks) -> None:
        """Wait for the first rank's configuration and make an engine with it.

        Raises RankLost if the first rank has ended.
        """
        self._ranks = ranks
        self._now = 0.0
        config = EngineConfig.model_validate_json(ranks.receive())
        self._engine = Engine(model, config, clock=lambda: self._now)

    def run(self) -> None:
        """Follow until the first rank closes.

        Raises RankLost if the first rank ends without closing, or if its tokens or failures differ
        from those of this rank.
        """
        drawn = _digest([])
        while (message := self._ranks.receive()) != _END:
            step = _Step.model_validate_json(message)
            if step.drawn != drawn:
                raise RankLost(f"rank {self._ranks.rank} has drawn other tokens than rank 0")
            for command in step.commands:
                if isinstance(command, _Submit):
                    self._now = command.now
                    self._engine.submit(command.request)
                else:
                    self._engine.cancel(command.request_id)
            self._now = step.now
            with self._ranks.together():
                drawn = _digest(self._engine.step())


class _AgreedClock:
    """A clock whose next reading can be fixed in advance.

    Decisions in a submission or a step depend only on its first reading of the clock, which is sent
    to the other ranks. Later readings only measure times.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next: float | None = None

    def agree(self) -> float:
        """Fix and return the next reading, in seconds."""
        self._next = self._clock()
        return self._next

    def __call__(self) -> float:
        agreed, self._next = self._next, None
        return self._clock() if agreed is None else agreed


def _digest(events: list[StepEvent]) -> str:
    """Hash the drawn tokens and the failures; ranks in agreement get the same digest."""
    drawn = [(event.request_id, event.token_ids) for event in events if isinstance(event, Delta)]
    failed = [event.request_id for event in events if isinstance(event, Failed)]
    return hashlib.sha256(repr((drawn, failed)).encode()).hexdigest()
