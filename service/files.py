"""Small files that are read at the start and again when they change: tokens and certificates.

Owns how such a file is read and how a change is noticed. Knows nothing of what is in it.
"""

import stat
from pathlib import Path

from a2sf.errors import InvalidArgument

MAX_FILE_BYTES = 2**20


def stamp(path: Path) -> tuple[int, ...] | None:
    """What another file, or another content of this one, has otherwise; None: it cannot be seen."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def read(path: Path, flag: str) -> bytes:
    """Return the content. Raises InvalidArgument with `flag`, which names the file."""
    try:
        seen = path.stat()
        # Opening a pipe would wait for its writer, and a device has no end.
        if not stat.S_ISREG(seen.st_mode):
            raise InvalidArgument(flag, f"{path}: not a regular file")
        if seen.st_size > MAX_FILE_BYTES:
            raise InvalidArgument(flag, f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(flag, f"{path}: {error.strerror}") from error
