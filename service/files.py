"""Files that are read at the start and again when they change: tables, tokens, certificates.

Owns how such a file is read and how a change is noticed. Knows nothing of what is in it.
"""

import os
import stat
from pathlib import Path

from a2sf.errors import InvalidArgument

MAX_FILE_BYTES = 2**20
"""Of tokens and certificates."""


class Unfit(Exception):
    """What is there is not to be read; the message says why, without the path."""


def stamp(path: Path) -> tuple[int, ...]:
    """What another file, or another content of this one, has otherwise."""
    try:
        seen = path.stat()
    except OSError as error:
        return (error.errno or 0,)
    return seen.st_dev, seen.st_ino, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size


def contents(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes, or a link to one. Raises Unfit or OSError."""
    # Without O_NONBLOCK, opening a pipe that nobody writes to would never return.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        seen = os.fstat(file.fileno())
        if not stat.S_ISREG(seen.st_mode):
            raise Unfit("not a regular file")
        if seen.st_size <= most:
            # The file may have grown since.
            data = file.read(most + 1)
            if len(data) <= most:
                return data
    raise Unfit(f"larger than {most} bytes")


def read(path: Path, flag: str) -> bytes:
    """Return the content. Raises InvalidArgument with `flag`, which names the file."""
    try:
        return contents(path, MAX_FILE_BYTES)
    except Unfit as error:
        raise InvalidArgument(flag, f"{path}: {error}") from None
    except OSError as error:
        raise InvalidArgument(flag, f"{path}: {error.strerror}") from error
