"""The wheels that pip builds from a source tree contain the modules of the tree, and no others."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.docs.shell import fresh_copy


def modules_of_wheel(project: Path, out: Path) -> set[str]:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, project], check=True, timeout=100
    )
    (wheel,) = out.glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("project", "module"), [(".", "tuner/cli"), ("clients/python", "a2sf/errors")]
)
def test_a_wheel_has_no_module_of_an_earlier_build(
    project: str, module: str, tmp_path: Path
) -> None:
    source = fresh_copy(tmp_path / "tree") / project
    before = modules_of_wheel(source, tmp_path / "before")
    assert f"{module}.py" in before
    (source / f"{module}.py").rename(source / f"{module}_moved.py")
    after = modules_of_wheel(source, tmp_path / "after")
    assert after == before - {f"{module}.py"} | {f"{module}_moved.py"}
    assert not (source / "build").exists()
