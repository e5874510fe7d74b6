"""What Ctrl-C does to the command line, from its first moment to its last.

Owns the handler of SIGINT. An exception that is raised wherever the program happens to be can be
lost, or leave gRPC waiting for a call that it no longer knows; so what an interrupt does depends on
where it comes: it ends the process while nothing needs an end, it is raised where that is safe, and
it ends a call from outside. A second one always ends the process. Knows nothing of calls, and loads
nothing.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""The exit code: 128 + SIGINT, as a shell has it."""


class Interrupt:
    """A handler of SIGINT, for the main thread. To begin with, one ends the process."""

    def __init__(self) -> None:
        self._came = False
        self._answer: Callable[[], None] = _leave

    def __call__(self, *_: object) -> None:
        """Hear one."""
        if self._came:
            # Whoever sends a second one has waited long enough.
            _leave()
        self._came = True
        self._answer()

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within the block, raise it as KeyboardInterrupt."""
        with self._answered_by(_raise):
            yield

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Within the block, call `end`, which makes it end; then raise KeyboardInterrupt.

        `end` is called in a thread of its own, so it may wait for what the main thread holds.
        """
        try:
            with self._answered_by(threading.Thread(target=end, daemon=True).start):
                yield
        finally:
            if self._came:
                # However the block ended: that was the interrupt's doing.
                raise KeyboardInterrupt from None

    @contextmanager
    def _answered_by(self, answer: Callable[[], None]) -> Iterator[None]:
        before, self._answer = self._answer, answer
        try:
            yield
        finally:
            self._answer = before


def _leave() -> None:
    os._exit(INTERRUPTED)


def _raise() -> None:
    raise KeyboardInterrupt
