"""How many threads torch computes with on a processor, and how they wait for each other.

Owns the count: what torch finds, cut to the processors that a container is granted. torch counts
the machine's cores, and more threads than granted processors wait for each other at every step.
"""

import math
import os
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""Where the kernel tells a container its processor quota."""


def set_threads(count: int | None = None) -> int:
    """Set and return the threads of torch's operations, for the whole process.

    None takes what torch would (OMP_NUM_THREADS, else the cores), but no more than a cgroup's
    processor quota.
    """
    # Here, because what comes before `wait_passively` must not bring torch.
    import torch

    found = torch.get_num_threads()
    chosen = count or min(found, granted(CGROUP_LIMIT) or found)
    torch.set_num_threads(chosen)
    return chosen


def wait_passively() -> None:
    """Have threads that wait for each other sleep, unless OMP_WAIT_POLICY says otherwise.

    By default those of libgomp, which torch's wheel brings, spin for a while. Where other work
    wants the cores, that takes the time of the very threads that are waited for: a decode step of
    two threads beside two busy processes takes seven times as long and more
    (benchmarks/results/waiting-cpu.json). libgomp reads its environment when it is loaded, so this
    must come before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def granted(limit: Path) -> int | None:
    """Return the processors that a cgroup's cpu.max grants, rounded up; None without a quota.

    Source: the kernel's documentation of control groups, version 2: "$MAX $PERIOD", "max" for none.
    """
    try:
        quota, period = limit.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(math.ceil(int(quota) / int(period)), 1)
