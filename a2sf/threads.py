"""How many threads torch computes with on a processor.

Owns the count: what torch finds, cut to the processors that a container is granted. torch counts
the machine's cores, and more threads than granted processors wait for each other at every step.
"""

import math
from pathlib import Path

import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def set_threads(count: int | None = None) -> int:
    """Set and return the threads of torch's operations, for the whole process.

    None takes what torch would (OMP_NUM_THREADS, else the cores), but no more than a cgroup's
    processor quota.
    """
    found = torch.get_num_threads()
    chosen = count or min(found, granted(_CGROUP_LIMIT) or found)
    torch.set_num_threads(chosen)
    return chosen


def granted(limit: Path) -> int | None:
    """Return the processors that a cgroup's cpu.max grants, rounded up; None without a quota.

    Source: the kernel's documentation of control groups, version 2: "$MAX $PERIOD", "max" for none.
    """
    try:
        quota, period = limit.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(math.ceil(int(quota) / int(period)), 1)
