"""Handles Ctrl-C at any moment: one line that says how to continue, and exit code 130.

Owns the handler of SIGINT. Knows nothing of the interrupted work: the code that stores results must
ensure that finished results are kept.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""The exit code: 128 + SIGINT, as in a shell."""


class Interrupted(BaseException):
    """SIGINT was received.

    Not a KeyboardInterrupt, because libraries catch and report that themselves.
    """


class _Handler:
    """Raises Interrupted at the first signal, and ends the process immediately at the second."""

    def __init__(self) -> None:
        self.interrupted = False
        self.finished = False

    def __call__(self, _: int, __: FrameType | None) -> None:
        if self.finished:
            # The work is complete, or the line was already printed.
            return
        if self.interrupted:
            os._exit(INTERRUPTED)
        self.interrupted = True
        raise Interrupted


@contextmanager
def message_on_interrupt(line: str) -> Iterator[None]:
    """Within the block, SIGINT prints `line` to standard error and exits with INTERRUPTED.

    After the block SIGINT has no effect, because the process is about to end. If the process was
    started with SIGINT ignored, as by a shell for background jobs, it stays ignored.
    """
    handler = _Handler()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    except BaseException:
        # A library that was interrupted during its import may have raised another error instead.
        if not handler.interrupted:
            raise
        handler.finished = True
        print(line, file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    finally:
        handler.finished = True
