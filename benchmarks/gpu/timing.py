"""Times turns of steps, and summarises them.

A step ends with its tokens on the host, so the wall clock is sufficient. Single kernels are timed
by the device's events.
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
    """Run untimed steps, then timed steps; each must end on the host."""
    for _ in range(untimed):
        step()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - began))
    return times


def figures(turns: list[Turn], batch: int) -> dict[str, Any]:
    """Summarise a variant's turns: mean steps, and the 99th percentile of single steps."""
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
    """Milliseconds of device time of an action, for each repeat after one warm-up."""
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
