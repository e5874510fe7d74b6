"""Starting the processes of one model in tests, as torchrun does, on this machine alone."""

import os
import sys

LAUNCH = (
    *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
    *("--nproc-per-node", "2"),
)
"""What stands before the program and its arguments."""


def command(*program: str) -> list[str]:
    """Return the command line that runs `program` as two processes."""
    return [sys.executable, *LAUNCH, *program]


def environment() -> dict[str, str]:
    """Return this process's environment, with the ranks kept to the loopback interface."""
    return {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
