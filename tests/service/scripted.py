"""A scripted engine, for tests of the code around the engine."""

import asyncio
import threading
import time
from contextlib import aclosing
from dataclasses import dataclass, field

from a2sf.errors import InvalidArgument
from a2sf.requests import (
    CacheStatistics,
    Delta,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Timings,
    Usage,
)
from service.backend.runner import EngineRunner
from tests.service.conftest import WAIT_S

ENDLESS = 10**6
UNLUCKY, REFUSED = ENDLESS + 13, ENDLESS + 14

STEP_S = 0.0005
"""What a step takes, so that an engine without a pace does not run away from its readers."""


@dataclass
class ScriptedEngine:
    """Generates one word per step for each row, up to the requested number, and records its calls.

    With `permits` it takes one for each step, and waits in the step until there is one.
    """

    max_batch: int = 100
    permits: threading.Semaphore | None = None
    rows: dict[str, int] = field(default_factory=dict)
    """Words still to be said."""
    said: dict[str, int] = field(default_factory=dict)
    """Words said; each tells by its token how many there were before."""
    queue: dict[str, int] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    steps: int = 0
    """Those begun."""
    break_with: BaseException | None = None

    @property
    def engine(self) -> "ScriptedEngine":
        return self

    @property
    def has_work(self) -> bool:
        return bool(self.rows or self.queue)

    @property
    def running(self) -> int:
        return len(self.rows)

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def kv_bytes_used(self) -> int:
        return 10 * len(self.rows)

    def submit(self, request: GenerationRequest) -> None:
        self.threads.add(threading.get_ident())
        if request.max_new_tokens == UNLUCKY:
            raise RuntimeError("unlucky")
        if request.max_new_tokens == REFUSED:
            raise InvalidArgument("max_new_tokens", "refused")
        assert request.request_id not in self.rows.keys() | self.queue.keys(), "an id of two"
        self.submitted.append(request.request_id)
        self.queue[request.request_id] = request.max_new_tokens

    def cancel(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        self.cancelled.append(request_id)
        self.rows.pop(request_id, None)
        self.queue.pop(request_id, None)

    def step(self) -> list[Event]:
        self.threads.add(threading.get_ident())
        self.steps += 1
        permits = self.permits
        if permits is not None:
            permits.acquire()
        else:
            time.sleep(STEP_S)
        if self.break_with is not None:
            raise self.break_with
        while self.queue and len(self.rows) < self.max_batch:
            name = next(iter(self.queue))
            self.rows[name] = self.queue.pop(name)
            self.said[name] = 0
        events: list[Event] = []
        for name in list(self.rows):
            events.append(Delta(request_id=name, text="word", token_ids=(self.said[name],)))
            self.said[name] += 1
            self.rows[name] -= 1
            if not self.rows[name]:
                del self.rows[name]
                events.append(finished(name))
        return events


def finished(name: str) -> Finished:
    return Finished(
        request_id=name,
        reason=FinishReason.LENGTH,
        matched_stop=None,
        usage=Usage(prompt_tokens=1, completion_tokens=1),
        cache=CacheStatistics(
            budget=1, kept_tokens=1, evicted_tokens=0, kv_bytes=1, kv_bytes_full=1
        ),
        timings=Timings(queue_s=0.0, prefill_s=0.0, decode_s=0.0),
    )


def request(name: str, max_new_tokens: int = ENDLESS) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_ids=(1,), max_new_tokens=max_new_tokens)


async def take(
    runner: EngineRunner, name: str, count: int, max_new_tokens: int = ENDLESS
) -> list[Event]:
    """Read `count` events and leave."""
    taken: list[Event] = []
    async with (
        asyncio.timeout(WAIT_S),
        aclosing(runner.stream(request(name, max_new_tokens))) as events,
    ):
        async for event in events:
            taken.append(event)
            if len(taken) == count:
                break
    return taken


def let_it_step(engine: ScriptedEngine, count: int = 1) -> None:
    assert engine.permits is not None
    engine.permits.release(count)


def let_it_go(engine: ScriptedEngine) -> None:
    """Let it step by itself from now on."""
    permits, engine.permits = engine.permits, None
    assert permits is not None
    permits.release()
