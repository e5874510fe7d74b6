"""Compiles numba kernels for processors, caches them on disk, and runs them in threads.

Owns the cache's location and the threads. Kernels run in the threads of torch's OpenMP, so that
there is only one thread pool: two would compete for the processor. Needs no other compiler. Knows
nothing of what the kernels compute.

numba caches next to the source, else in the user's cache folder, or in NUMBA_CACHE_DIR. If none of
these is writable, we use a private folder among the temporary files. If that fails too, each
process compiles again.
"""

import ctypes
import hashlib
import inspect
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numba
import torch


@cache
def _parallel() -> Any:
    """Find `GOMP_parallel` in the OpenMP library that torch uses; None if it has none.

    Searched through torch's library, because the process may have loaded another copy of OpenMP.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found


def available() -> bool:
    """Whether kernels can run: whether torch's OpenMP library has GNU's entry points."""
    return _parallel() is not None


def run(program: int, data: int, threads: int) -> None:
    """Run a kernel in `threads` threads, including this one, without holding the GIL.

    Args:
        program: the address of a C function that takes a pointer.
        data: the argument for each thread.
        threads: at least 1.
    """
    _parallel()(program, data, threads, 0)


def compiled(
    function: Callable[[Any], None], signature: Any, *, uses: Sequence[ModuleType] = ()
) -> int:
    """Compile a kernel, or load it from the cache; return its address.

    Takes seconds the first time on a machine, and a fraction of a second later. The kernel stays
    loaded until the process ends.

    Args:
        function: the kernel.
        signature: its numba signature.
        uses: the other modules whose compiled code or constants the kernel uses.
    """
    function = _keyed(function, uses)
    try:
        return _kept(numba.cfunc(signature, cache=True)(function))
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    folder = _own_folder()
    if folder is None:
        return _kept(numba.cfunc(signature)(function))
    usual, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        return _kept(numba.cfunc(signature, cache=True)(function))
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
