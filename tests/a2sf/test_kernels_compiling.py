"""Compiled programs: kept where they may be kept, and run beside Python's other threads."""

import ctypes
import tempfile
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import carray, types

from a2sf.kernels import compiling, walk_programs

SIGNATURE = types.void(types.voidptr)
TURNS = 300_000_000


def answer(data):  # type: ignore[no-untyped-def]
    carray(data, 1, np.int64)[0] = 42


def wait(data):  # type: ignore[no-untyped-def]
    """Count up, for seconds if nobody else writes a higher number."""
    counter = carray(data, 1, np.int64)
    while walk_programs._next(walk_programs._longs(counter.ctypes.data)) < TURNS:
        pass


def test_a_program_runs_in_as_many_threads_as_are_asked_for() -> None:
    number = ctypes.c_int64(0)
    program = compiling.compiled(answer, SIGNATURE)
    for threads in (1, 2):
        number.value = 0
        compiling.run(program, ctypes.addressof(number), threads)
        assert number.value == 42


def test_other_threads_go_on_while_a_program_runs() -> None:
    count = ctypes.c_int64(0)
    program = compiling.compiled(wait, SIGNATURE)
    at_work = threading.Thread(target=compiling.run, args=(program, ctypes.addressof(count), 1))
    at_work.start()
    while count.value == 0:
        pass
    count.value = 2 * TURNS
    at_work.join()
    # The program was there to see it.
    assert count.value == 2 * TURNS + 1


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Neither the package's folder nor the user's can be written; only temporary files."""
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    return tmp_path


def runs(program: int) -> bool:
    number = ctypes.c_int64(0)
    compiling.run(program, ctypes.addressof(number), 1)
    return number.value == 42


def test_where_nothing_else_can_be_written_programs_are_kept_for_this_user_alone(
    nowhere: Path,
) -> None:
    assert runs(compiling.compiled(answer, SIGNATURE))
    (folder,) = nowhere.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.rglob("*.nbc"))


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_programs_are_not_taken_from_where_others_may_write(nowhere: Path, kind: str) -> None:
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
