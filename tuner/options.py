"""What all commands share: checks of options that need nothing loaded, so that a slip is told at
once, and how a failure is told.

Owns the wording of what is wrong. Knows nothing of which commands there are.
"""

import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from a2sf.errors import InvalidArgument, NotFound


def check_ranges(values: dict[str, tuple[int | None, int, int | None]]) -> None:
    """Raise InvalidArgument for a value outside [low, high]; None is no value, or no end."""
    for name, (value, low, high) in values.items():
        if value is not None and (value < low or (high is not None and value > high)):
            accepted = f"{low} or more" if high is None else f"{low} to {high}"
            raise InvalidArgument(f"--{name}", f"{value}; accepted: {accepted}")


def check_writable(out: Path, option: str = "--out") -> None:
    """Raise NotFound or InvalidArgument, naming the option, unless a file can be written there."""
    directory = out.parent
    if not directory.is_dir():
        raise NotFound(f"{option} {out}: there is no directory {directory}; make it first")
    if out.is_dir():
        raise InvalidArgument(option, f"{out} is a directory; give a file")
    if not os.access(directory, os.W_OK):
        raise InvalidArgument(option, f"{directory} cannot be written to")


def numbers(
    option: str, written: str | None, accepted: str, fits: Callable[[float], bool]
) -> list[float]:
    """Read numbers with commas between them, in the order given.

    Raises InvalidArgument with what is `accepted` for one that does not fit, or is given twice.
    """
    values: list[float] = []
    for one in (written or "").split(","):
        if not one.strip():
            continue
        try:
            value = float(one)
        except ValueError:
            value = math.nan
        if not fits(value) or value in values:
            raise InvalidArgument(
                option, f"{one.strip()!r}; accepted: {accepted}, each once, comma between them"
            )
        values.append(value)
    return values


def without_paths(arguments: Sequence[str]) -> str:
    """The command line that was given, but for the directories that paths stand in."""
    words = (Path(word).name if os.sep in word else word for word in arguments)
    return shlex.join(["python", "-m", "tuner", *words])


def fail(message: str, code: int = 2) -> NoReturn:
    """Tell what is wrong in one line on standard error, and exit."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
