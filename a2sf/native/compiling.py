"""Compiles numba kernels for processors, and caches them on disk.

Owns the cache's location. Needs no other compiler. Knows nothing of what the kernels compute, or
in which threads they run.

numba caches next to the source, else in the user's cache folder, or in NUMBA_CACHE_DIR. If none of
these is writable, we use a private folder among the temporary files. If that fails too, each
process compiles again.
"""

import hashlib
import inspect
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numba
from numba import types

SIGNATURE = types.void(types.voidptr)
"""A kernel takes the address of its arguments, which all threads share."""


def compiled(function: Callable[[Any], None], *, uses: Sequence[ModuleType] = ()) -> int:
    """Compile a kernel, or load it from the cache; return its address.

    Takes seconds the first time on a machine, and a fraction of a second later. The kernel stays
    loaded until the process ends.

    Args:
        function: the kernel.
        uses: the other modules whose compiled code or constants the kernel uses.
    """
    function = _keyed(function, uses)
    try:
        return _kept(numba.cfunc(SIGNATURE, cache=True)(function))
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    folder = _own_folder()
    if folder is None:
        return _kept(numba.cfunc(SIGNATURE)(function))
    usual, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        return _kept(numba.cfunc(SIGNATURE, cache=True)(function))
    finally:
        numba.config.CACHE_DIR = usual


def _keyed(function: Callable[[Any], None], uses: Sequence[ModuleType]) -> Callable[[Any], None]:
    """Return a copy of `function` whose name, and so its cache file, changes with these modules.

    numba's cache notices changes only in the file of the cached function itself.
    """
    digest = hashlib.sha256("".join(map(inspect.getsource, uses)).encode()).hexdigest()
    copy = FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = f"{function.__qualname__}_{digest[:16]}"
    return copy


_programs: list[Any] = []
"""Compiled kernels. They are never freed, because callers hold their addresses."""


def _kept(program: Any) -> int:
    _programs.append(program)
    address: int = program.address
    return address


def _own_folder() -> Path | None:
    """A private folder of this user among the temporary files, or None.

    The process runs code from this folder, so no other user may have write access.
    """
    folder = Path(tempfile.gettempdir()) / f"a2sf-numba-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(found.st_mode) and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return folder if private and found.st_uid == os.getuid() else None
