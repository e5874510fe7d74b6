"""Starts the processes of one model in tests, as torchrun does, only on this machine."""

import os
import sys

LAUNCH = (
    *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
    *("--nproc-per-node", "2"),
)
"""The command before the program and its arguments."""


def command(*program: str) -> list[str]:
    """Return the command line that runs `program` as two processes."""
    return [sys.executable, *LAUNCH, *program]


def environment() -> dict[str, str]:
    """Return this process's environment, with ranks restricted to the loopback interface."""
    return {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
