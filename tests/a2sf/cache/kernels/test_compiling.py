"""Compiled kernels are cached in a safe folder, and run in parallel with Python's threads."""

import ctypes
import tempfile
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import carray, types

from a2sf.cache.kernels import compiling, walk_programs

SIGNATURE = types.void(types.voidptr)
TURNS = 300_000_000


def answer(data):  # type: ignore[no-untyped-def]
    carray(data, 1, np.int64)[0] = 42


def wait(data):  # type: ignore[no-untyped-def]
    """Count up; stop early when another thread writes a higher number."""
    counter = carray(data, 1, np.int64)
    while walk_programs._next(walk_programs._longs(counter.ctypes.data)) < TURNS:
        pass


def test_a_kernel_runs_in_the_requested_number_of_threads() -> None:
    number = ctypes.c_int64(0)
    program = compiling.compiled(answer, SIGNATURE)
    for threads in (1, 2):
        number.value = 0
        compiling.run(program, ctypes.addressof(number), threads)
        assert number.value == 42


def test_other_python_threads_run_while_a_kernel_runs() -> None:
    count = ctypes.c_int64(0)
    program = compiling.compiled(wait, SIGNATURE)
    at_work = threading.Thread(target=compiling.run, args=(program, ctypes.addressof(count), 1))
    at_work.start()
    while count.value == 0:
        pass
    count.value = 2 * TURNS
    at_work.join()
    # The kernel was still running and has seen the number.
    assert count.value == 2 * TURNS + 1


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Only the folder of temporary files is writable, not the package's or the user's folder."""
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    return tmp_path


def runs(program: int) -> bool:
    number = ctypes.c_int64(0)
    compiling.run(program, ctypes.addressof(number), 1)
    return number.value == 42


def test_without_another_writable_folder_kernels_are_cached_in_a_private_one(
    nowhere: Path,
) -> None:
    assert runs(compiling.compiled(answer, SIGNATURE))
    (folder,) = nowhere.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.rglob("*.nbc"))


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_kernels_are_not_loaded_from_a_folder_that_others_can_write(
    nowhere: Path, kind: str
) -> None:
    folder = compiling._own_folder()
    assert folder is not None
    folder.rmdir()
    if kind == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif kind == "a link":
        (nowhere / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(nowhere / "elsewhere")
    else:
        folder.touch()
    assert runs(compiling.compiled(answer, SIGNATURE))
    assert not list(nowhere.rglob("*.nbc"))
