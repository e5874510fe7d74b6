"""What the runner needs of an engine.

Owns the two protocols and the load that an engine reports. Knows nothing of threads and streams.
"""

from dataclasses import dataclass
from typing import Protocol

from a2sf.requests import GenerationRequest, StepEvent


class EngineProtocol(Protocol):
    """The part of an engine that the thread uses; `a2sf.engine.engine.Engine` implements it."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has work."""

    @property
    def running(self) -> int:
        """Requests that hold a row or are in prefill."""

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""

    @property
    def kv_bytes_used(self) -> int:
        """Bytes of the slots that hold tokens."""

    def submit(self, request: GenerationRequest) -> None:
        """Validate and queue a request."""

    def cancel(self, request_id: str) -> None:
        """Drop a request; unknown ids are ignored."""

    def step(self) -> list[StepEvent]:
        """Run one step."""


class EngineHolder(Protocol):
    """The result of the build function: an engine, with anything loaded for it."""

    @property
    def engine(self) -> EngineProtocol:
        """The engine."""


@dataclass(frozen=True)
class EngineLoad:
    """Requests in the engine; requests still in the inbox are not counted."""

    running: int
    """Requests that hold a row or are in prefill."""
    waiting: int
    """Requests that wait for a row."""
    kv_bytes_used: int
    """Bytes of the slots that hold tokens."""
