"""Programs for processors, compiled by numba once and kept on disk, and the threads that run them.

Owns where compiled programs are kept and how one is run: by the threads of torch's own OpenMP, so
that a step has one pool of threads and not two that wait for each other's processors. Needs no
compiler beside numba. Knows nothing of what the programs do.

numba keeps what it has compiled beside the source, else in the user's cache folder, or where
NUMBA_CACHE_DIR says. Where none of them can be written, it is kept in a folder of the user's own
among the temporary files; where that cannot be had either, each process compiles for itself.
"""

import ctypes
import os
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch


@cache
def _parallel() -> Any:
    """Find `GOMP_parallel` of the OpenMP library that torch runs on; None where it has another.

    Looked for by way of torch's own library: another copy of OpenMP may be in the process.
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
    """Whether programs can run here: whether torch runs on an OpenMP with GNU's entry points."""
    return _parallel() is not None


def run(program: int, data: int, threads: int) -> None:
    """Run a program in so many threads, this one among them; other Python threads go on meanwhile.

    Args:
        program: the address of a C function that takes a pointer.
        data: what each thread calls it with.
        threads: at least 1.
    """
    _parallel()(program, data, threads, 0)


def compiled(function: Callable[[Any], None], signature: Any) -> int:
    """Compile a program, or load what was compiled before; return its address.

    Takes seconds the first time on a machine, and a fraction of one later. The program lives as
    long as the process.
    """
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


_programs: list[Any] = []
"""That are never freed: their addresses were given away."""


def _kept(program: Any) -> int:
    _programs.append(program)
    address: int = program.address
    return address


def _own_folder() -> Path | None:
    """A folder for this user alone among the temporary files, or None.

    What lies there is run, so that it must be nobody else's to write.
    """
    folder = Path(tempfile.gettempdir()) / f"a2sf-numba-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(found.st_mode) and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return folder if private and found.st_uid == os.getuid() else None
