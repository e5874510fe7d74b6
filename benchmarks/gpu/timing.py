"""Turns of steps, and what is told of them.

A step ends with its tokens on the host, so that the wall clock needs no help. Kernels alone are
timed by the device's own events.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers.results import quartiles, summarise

Turn = list[float]
"""Milliseconds of each timed step."""


def turn(step: Callable[[], object], untimed: int, count: int) -> Turn:
    """Take so many steps and time the last ones; each must end on the host."""
    for _ in range(untimed):
        step()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - began))
    return times


def figures(turns: list[Turn], batch: int) -> dict[str, Any]:
    """A variant's turns as figures: the step as a turn's mean, and single steps to the 99th."""
    steps = sorted(time for one in turns for time in one)
    summary = summarise(turns, batch)
    del summary["turn_means_ms"]
    return {**summary, "ms_single_step_p99": round(steps[math.ceil(0.99 * len(steps)) - 1], 4)}


def spread(values: list[float], digits: int = 4) -> dict[str, Any]:
    """Median and quartiles."""
    return {
        "median": round(statistics.median(values), digits),
        "quartiles": [round(one, digits) for one in quartiles(values)],
    }


def device_ms(action: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds that the device works on an action, of each repeat after one that warms up."""
    action()
    if device.type != "cuda":
        return turn(action, 0, repeats)
    times = []
    for _ in range(repeats):
        begin, end = _event(), _event()
        begin.record()
        action()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
