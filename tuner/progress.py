"""Shows the progress of a long run: one updated line on a terminal, plain lines elsewhere.

Owns when a line is shown, and how durations are written. Knows nothing of what is run.
"""

import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

LINES_PACE_S = 30.0
"""Minimum seconds between two plain lines, except at the start of a part."""

TERMINAL_PACE_S = 0.1

COLUMNS = 80
"""Width of a terminal that does not report one."""

BAR = "{desc} |{bar}|"
"""The line on a terminal; the bar takes the remaining width."""


def duration(seconds: float) -> str:
    """Format a duration for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """Shows on standard error the current part of a run, and one estimate for the whole run.

    A context manager: at its end the line on the terminal is erased.
    """

    def __init__(self, kind: str, parts: Sequence[str] = (), *, about: str = "about") -> None:
        """Show nothing yet.

        Args:
            kind: the word for a part, as in "stage".
            parts: all parts by name, in order; empty if unknown.
            about: the words before the remaining time, as in "at most".
        """
        self._kind = kind
        self._parts = tuple(parts)
        self._about = about
        self._part = ""
        self._left: float | None = None
        self._share = 0.0
        self._from = 0.0
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, line: str) -> None:
        """Show a line permanently."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def begin(self, part: str, done: float = 0.0, left: float | None = None) -> None:
        """Begin a part; a part that is not in `parts` is shown without a number.

        `done` and `left` are those of `show`.
        """
        number = ""
        if part in self._parts:
            number = f"{self._kind} {self._parts.index(part) + 1} of {len(self._parts)}: "
        self._part = f"{number}{part}"
        self._update_estimate(done, left)
        self._write("", at_once=True)

    def show(self, detail: str, done: float = 0.0, left: float | None = None) -> None:
        """Show the progress within the part.

        Args:
            detail: in a few words.
            done: seconds that the run has taken so far.
            left: remaining seconds of the run; None: as last reported.
        """
        self._update_estimate(done, left)
        self._write(detail)

    def _update_estimate(self, done: float, left: float | None) -> None:
        if left is not None:
            self._left = max(left, 0.0)
            self._share = done / max(done + self._left, 1e-9)

    def _write(self, detail: str, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if now < self._from and not at_once:
            return
        words = [self._part, detail]
        if self._left is not None:
            words.append(f"{self._about} {duration(self._left)} left")
        line = "; ".join(word for word in words if word)
        if not sys.stderr.isatty():
            self._from = now + LINES_PACE_S
            print(line, file=sys.stderr, flush=True)
            return
        self._from = now + TERMINAL_PACE_S
        # A terminal that does not know its size reports 0 columns, for which tqdm shows nothing.
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS
        if self._bar is None:
            self._bar = tqdm(desc=line, total=1.0, leave=False, ncols=columns, bar_format=BAR)
        self._bar.n = self._share
        self._bar.ncols = columns
        self._bar.set_description_str(line)
