"""The number of torch's threads on a processor, and how they wait for each other.

Owns the number: torch's default, limited to a container's processor quota. torch counts the
machine's cores; with more threads than the quota allows, threads wait for each other in every step.
"""

import math
import os
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""The file with a container's processor quota."""


def set_threads(count: int | None = None) -> int:
    """Set and return the number of torch's threads, for the whole process.

    None: torch's default (OMP_NUM_THREADS, else the number of cores), limited to the cgroup's
    processor quota.
    """
    # Imported here, because torch must not be imported before `wait_passively`.
    import torch

    found = torch.get_num_threads()
    chosen = count or min(found, granted(CGROUP_LIMIT) or found)
    torch.set_num_threads(chosen)
    return chosen


def wait_passively() -> None:
    """Make waiting threads sleep instead of spin, unless OMP_WAIT_POLICY is set.

    By default, waiting threads of libgomp (part of torch's wheel) spin for a while. On busy cores
    they take time from the threads that they wait for: a decode step of two threads next to two
    busy processes takes more than seven times as long (benchmarks/results/waiting-cpu.json).
    libgomp reads its environment when it is loaded, so call this before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def granted(limit: Path) -> int | None:
    """Return the number of processors in a cgroup's cpu.max, rounded up; None without a quota.

    Source: the kernel's documentation of control groups, version 2: "$MAX $PERIOD", "max" for none.
    """
    try:
        quota, period = limit.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(math.ceil(int(quota) / int(period)), 1)
