"""Compiled kernels are cached, also where only a private folder is writable."""

import ctypes
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest
from numba import carray

from a2sf.native import compiling, team


def answer(data):  # type: ignore[no-untyped-def]
    carray(data, 1, np.int64)[0] = 42


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a file again, as another process would."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_a_change_in_a_module_that_the_kernel_uses_compiles_the_kernel_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    used, kernel = tmp_path / "used_by_kernel.py", tmp_path / "kernel.py"
    kernel.write_text(
        "import numpy as np\n"
        "from numba import carray\n"
        "from used_by_kernel import number\n"
        "def write(data):\n"
        "    carray(data, 1, np.int64)[0] = number()\n"
    )
    found = []
    for answer in (41, 42, 42):
        used.write_text(f"from numba import njit\n@njit\ndef number():\n    return {answer}\n")
        uses = load(used, monkeypatch)
        write = load(kernel, monkeypatch).write
        number = ctypes.c_int64(0)
        program = compiling.compiled(write, uses=[uses])
        team.run(program, ctypes.addressof(number), 1)
        found.append(number.value)
    assert found == [41, 42, 42]
    # One file per version: the third call has loaded the second's.
    assert len(list(tmp_path.rglob("*.nbc"))) == 2


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Only the folder of temporary files is writable, not the package's or the user's folder."""
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    return tmp_path


def runs(program: int) -> bool:
    number = ctypes.c_int64(0)
    team.run(program, ctypes.addressof(number), 1)
    return number.value == 42


def test_without_another_writable_folder_kernels_are_cached_in_a_private_one(
    nowhere: Path,
) -> None:
    assert runs(compiling.compiled(answer))
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
    assert runs(compiling.compiled(answer))
    assert not list(nowhere.rglob("*.nbc"))
