"""Stores a run's results, on disk after every entry, and defines deadlines of parts.

The document is JSON:

    format    1
    date, command, settings
    machine   {name: text or number}, with copy_gb_per_s and matmul_tflop_per_s of the same run
    checks    "passed", "failed", "incomplete" (for lack of time) or "not run"; no timing is
              valid unless they passed
    parts     [{name, status, took_s, reason?}] in the order in which they ran
    entries   [{part, name, status, reason?, ...figures}]

A status is "measured", "passed", "failed" (with the message), "not supported" or "skipped" (with
the reason). The end of a figure's name gives its unit, `ms` or `s`. Of several values, the median
is stored, with quartiles. Knows nothing of how a figure is measured or shown.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1

Entry = dict[str, Any]


class OutOfTime(Exception):
    """A part has used up its time."""


class NotSupported(Exception):
    """The request is not possible here, by design or because a package is missing."""


class CheckFailed(Exception):
    """The engine computed a wrong result."""


@dataclass(frozen=True)
class Deadline:
    """A moment on a clock, in seconds."""

    at: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    @property
    def left(self) -> float:
        """Seconds until the moment; negative afterwards."""
        return self.at - self.clock()

    def check(self, needed_s: float = 0.0) -> None:
        """Raise OutOfTime unless at least this many seconds are left."""
        if self.left < needed_s:
            raise OutOfTime(f"{max(self.left, 0.0):.0f} s left of the part's time")

    def within(self, seconds: float) -> "Deadline":
        """Return the earlier of this and a deadline this many seconds from now."""
        return Deadline(min(self.at, self.clock() + seconds), self.clock)


class Report:
    """The document of one run."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        """`path` None writes nothing: a dry run has no figures."""
        self._path = path
        self._part = ""
        self.document: dict[str, Any] = {
            "format": FORMAT,
            **head,
            "machine": {},
            "checks": "not run",
            "parts": [],
            "entries": [],
        }

    @contextmanager
    def part(self, name: str) -> Iterator[Entry]:
        """Record a part; an exception in it is recorded, and the run continues."""
        self._part = name
        about: Entry = {"name": name, "status": "measured"}
        began = time.monotonic()
        try:
            yield about
        except Exception as error:
            about |= failure_entry(error)
        except BaseException:
            about |= {"status": "failed", "reason": "ended from outside"}
            raise
        finally:
            about["took_s"] = round(time.monotonic() - began, 1)
            self.document["parts"].append(about)
            self.write()

    def add(self, name: str, status: str = "measured", **figures: Any) -> None:
        """Record an entry of the running part."""
        self.document["entries"].append(
            {"part": self._part, "name": name, "status": status, **figures}
        )
        self.write()

    def missed(self, name: str, error: Exception, **about: Any) -> None:
        """Record that an entry has no figure, and why."""
        self.document["entries"].append(
            {"part": self._part, "name": name, **about, **failure_entry(error)}
        )
        self.write()

    @contextmanager
    def entry(self, name: str, **about: Any) -> Iterator[None]:
        """Record an exception as this entry's reason, and continue."""
        try:
            yield
        except Exception as error:
            self.missed(name, error, **about)

    def write(self) -> None:
        """Replace the file atomically."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(self._path.name + ".draft")
        draft.write_text(json.dumps(self.document, indent=1) + "\n")
        draft.replace(self._path)


def failure_entry(error: Exception) -> Entry:
    """Return a status and its reason, in one line."""
    status = "failed"
    if isinstance(error, NotSupported):
        status = "not supported"
    elif isinstance(error, OutOfTime):
        status = "skipped"
    message = " ".join(str(error).split())[:400]
    if status != "failed":
        return {"status": status, "reason": message}
    return {"status": status, "reason": f"{type(error).__name__}: {message}"}
