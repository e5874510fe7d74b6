"""Handles Ctrl-C in the command line, from its start to its end.

Owns the handler of SIGINT. An exception raised at an arbitrary point can be lost, or can leave gRPC
waiting for a call that it no longer knows. So the effect of an interrupt depends on the point: it
ends the process while nothing needs cleanup, raises an exception while that is safe, and otherwise
ends the call from another thread. A second interrupt always ends the process. Knows nothing of
calls, and imports nothing slow.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after an interrupt: 128 + SIGINT, as in a shell."""


class Interrupt:
    """A SIGINT handler for the main thread. By default, an interrupt ends the process."""

    def __init__(self) -> None:
        self._interrupted = False
        self._action: Callable[[], None] = _exit

    def __call__(self, *_: object) -> None:
        """Handle one interrupt."""
        if self._interrupted:
            # A second interrupt: the user does not want to wait any longer.
            _exit()
        self._interrupted = True
        self._action()

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within the block, an interrupt raises KeyboardInterrupt."""
        with self._during(_raise):
            yield

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Within the block, an interrupt calls `end`; the block then raises KeyboardInterrupt.

        `end` must make the block end. It runs in a separate thread, so it may wait for a lock that
        the main thread holds.
        """
        try:
            with self._during(threading.Thread(target=end, daemon=True).start):
                yield
        finally:
            if self._interrupted:
                # Whether the block raised or not, the interrupt is the cause.
                raise KeyboardInterrupt from None

    @contextmanager
    def _during(self, action: Callable[[], None]) -> Iterator[None]:
        before, self._action = self._action, action
        try:
            yield
        finally:
            self._action = before


def _exit() -> None:
    os._exit(INTERRUPTED)


def _raise() -> None:
    raise KeyboardInterrupt
