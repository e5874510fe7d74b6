"""Reads files at startup and again when they change: tables, tokens, certificates.

Owns reading such a file and detecting changes. Knows nothing of the content.
"""

import os
import stat
from pathlib import Path

from a2sf.errors import InvalidArgument

MAX_FILE_BYTES = 2**20
"""Size limit of files with tokens or certificates."""


class UnreadableFile(Exception):
    """The file cannot be read; the message says why, without the path."""


def stamp(path: Path) -> tuple[int, ...]:
    """Return values that change when the file is replaced or its content changes."""
    try:
        seen = path.stat()
    except OSError as error:
        return (error.errno or 0,)
    return seen.st_dev, seen.st_ino, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes` bytes, or a link to one. Raises
    UnreadableFile or OSError."""
    # Without O_NONBLOCK, opening a pipe without a writer would block forever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        seen = os.fstat(file.fileno())
        if not stat.S_ISREG(seen.st_mode):
            raise UnreadableFile("not a regular file")
        if seen.st_size <= max_bytes:
            # The file may have grown since.
            data = file.read(max_bytes + 1)
            if len(data) <= max_bytes:
                return data
    raise UnreadableFile(f"larger than {max_bytes} bytes")


def read(path: Path, flag: str) -> bytes:
    """Return the content. Raises InvalidArgument with `flag`, the flag that gave the path."""
    try:
        return read_limited(path, MAX_FILE_BYTES)
    except UnreadableFile as error:
        raise InvalidArgument(flag, f"{path}: {error}") from None
    except OSError as error:
        raise InvalidArgument(flag, f"{path}: {error.strerror}") from error
