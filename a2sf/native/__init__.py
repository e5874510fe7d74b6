"""Compiling and running kernels on processors, with numba and without another compiler."""

import sys


def available() -> bool:
    """Whether kernels can run here. Their threads need unnamed POSIX semaphores."""
    return sys.platform == "linux"
