"""The worker's side of the protocol: commands on stdin, answers on stdout, one JSON per line.

    {"do": "load", "model": DIR, "dtype": "float32", "threads": 2}
        -> {"versions": {...}}
    {"do": "fill", "seat": "a", "prompt": [...], "batch": 4, "budget": 128, "turn": 9, "room": 64}
        -> {"prefill_s": ..., "kv_bytes": ...}
    {"do": "steps", "seat": "a", "untimed": 1, "count": 8}
        -> {"ms": [...], "kv_tokens": ...}
    {"do": "drop", "seat": "a"} -> {}
    {"do": "end"}

A seat is a batch of filled rows that waits for its next turn. Any failure is answered as
`{"error": reason, "supported": bool}` and the worker continues. Imports the standard library only
and knows nothing of a peer: each worker contains its peer's code.
"""

import gc
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, TextIO


class NotSupported(Exception):
    """The peer cannot do this by design; the message gives the reason."""


@dataclass(frozen=True)
class Filling:
    """The content of a seat."""

    prompt: list[int]
    """Token ids, the same for every row."""
    batch: int
    """Rows."""
    budget: int | None
    """Tokens that a row may keep; None if the variant keeps all."""
    turn: int
    """Decode steps of one turn, including the untimed ones; periodic work is distributed over
    these."""
    room: int
    """The number of decode steps that the rows need room for."""


class Seat(Protocol):
    """Filled rows, ready to decode."""

    @property
    def prefill_s(self) -> float:
        """Seconds of the prefill of one row."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV memory that the peer holds for the rows."""
        ...

    def step(self) -> float:
        """Decode one token of every row; returns seconds."""
        ...

    def kv_tokens(self) -> float:
        """Tokens that a row's cache holds now, mean over rows."""
        ...

    def close(self) -> None:
        """Release the rows."""
        ...


class Peer(Protocol):
    """An engine under one setting."""

    @property
    def packages(self) -> Sequence[str]:
        """Distributions whose versions are reported."""
        ...

    def load(self, model: str, dtype: str, threads: int) -> None:
        """Load the model; called once, first."""
        ...

    def fill(self, filling: Filling) -> Seat:
        """Prefill the rows."""
        ...


def timed(action: Callable[[], object]) -> float:
    """Run an action and return its seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages in the environment of this process."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class Worker:
    """One peer and its seats; executes commands."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._seats: dict[str, Seat] = {}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Execute a command; a failure becomes an answer."""
        try:
            return self._execute(command)
        except NotSupported as reason:
            return {"error": str(reason), "supported": False}
        except Exception as error:
            traceback.print_exc()
            message = " ".join(str(error).split())[:400]
            return {"error": f"{type(error).__name__}: {message}", "supported": True}

    def _execute(self, command: dict[str, Any]) -> dict[str, Any]:
        match command.pop("do"):
            case "load":
                self._peer.load(**command)
                return {"versions": versions(self._peer.packages)}
            case "fill":
                name = command.pop("seat")
                self._drop(name)
                seat = self._seats[name] = self._peer.fill(Filling(**command))
                return {"prefill_s": seat.prefill_s, "kv_bytes": seat.kv_bytes}
            case "steps":
                return _turn(self._seats[command["seat"]], command["untimed"], command["count"])
            case "drop":
                self._drop(command["seat"])
                return {}
            case unknown:
                raise ValueError(f"no such command: {unknown}")

    def _drop(self, name: str) -> None:
        seat = self._seats.pop(name, None)
        if seat is not None:
            seat.close()
        del seat
        gc.collect()


def _turn(seat: Seat, untimed: int, count: int) -> dict[str, Any]:
    for _ in range(untimed):
        seat.step()
    times, tokens = [], []
    for _ in range(count):
        times.append(seat.step() * 1e3)
        tokens.append(seat.kv_tokens())
    return {"ms": times, "kv_tokens": sum(tokens) / len(tokens)}


def serve(peer: Peer) -> None:
    """Answer commands until `end` or the end of the input."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Output of libraries must not mix with the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    exchange(Worker(peer), sys.stdin, answers)


def exchange(worker: Worker, commands: TextIO, answers: TextIO) -> None:
    """Answer each command of a stream with a line."""
    for line in commands:
        command = json.loads(line)
        if command["do"] == "end":
            break
        print(json.dumps(worker.answer(command)), file=answers, flush=True)
