"""Ctrl-C, at whatever moment: one line that says how to go on, and exit code 130.

Owns the handler of SIGINT. Knows nothing of what is interrupted: that nothing finished is lost is
for those to see who store it.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""The exit code: 128 + SIGINT, as a shell has it."""


class Interrupted(BaseException):
    """SIGINT has come. Not a KeyboardInterrupt, which libraries catch and tell in their own way."""


class _Handler:
    """Raises Interrupted at the first signal, and ends the process at once at the second."""

    def __init__(self) -> None:
        self.came = False
        self.over = False

    def __call__(self, _: int, __: FrameType | None) -> None:
        if self.over:
            # Everything is done, or told already.
            return
        if self.came:
            os._exit(INTERRUPTED)
        self.came = True
        raise Interrupted


@contextmanager
def telling(line: str) -> Iterator[None]:
    """Within the block, SIGINT prints `line` to standard error and exits with INTERRUPTED.

    After the block it does nothing: the process is about to end. Where the process was started
    with SIGINT ignored, as a shell starts what runs in the background, it stays ignored.
    """
    handler = _Handler()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    except BaseException:
        # A library that was interrupted while it was imported may have made another error of it.
        if not handler.came:
            raise
        handler.over = True
        print(line, file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    finally:
        handler.over = True
