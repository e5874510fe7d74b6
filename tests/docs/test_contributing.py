"""The page for contributors is true: its paths and names exist, and its examples work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks, pages
from tests.docs.shell import fresh_copy

PAGE = "CONTRIBUTING.md"
PATCHES = [block for block in blocks(PAGE) if block.language == "diff"]
COMMANDS = [block for block in blocks(PAGE) if block.language == "bash"]

_PATH = re.compile(r"[\w.-]+(/[\w.-]+)+/?|[\w-]+\.(?:py|md|toml|txt)")
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?(?<!\.py)(?<!\.md)")


def prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def new_files() -> set[str]:
    """Files that a patch creates."""
    found = {
        name
        for patch in PATCHES
        for name in re.findall(r"^--- /dev/null\n\+\+\+ b/(.*)$", patch.text, re.MULTILINE)
    }
    assert found
    return found


def sections(page: str) -> list[str]:
    """The sections of a page that name modules in backticks, with their headings."""
    return [part for part in re.split(r"^(?=## )", prose(page), flags=re.M) if ".py`" in part]


EXAMPLES = [part for part in sections(PAGE) if part.startswith("## Example")]
PLACES = [part for part in sections("docs/architecture.md") if part.startswith("## Where")]


@pytest.mark.parametrize("section", [*EXAMPLES, *PLACES], ids=lambda part: part.split("\n")[0])
def test_every_name_in_a_section_is_in_a_file_that_the_section_names(section: str) -> None:
    words = quoted(section)
    files = [place for word in words if (place := file_of(word)) is not None]
    text = "\n".join(file.read_text() for file in files)
    names = [word.rsplit(".", 1)[-1] for word in words if _NAME.fullmatch(word)]
    assert len(names) > 5
    missing = [name for name in names if not re.search(rf"\b{name}\b", text)]
    assert not missing


def file_of(path: str) -> Path | None:
    """The file of a path as pages write it: from the root, or within a part."""
    for part in ("", "a2sf", "service", "tuner"):
        if (ROOT / part / path).is_file():
            return ROOT / part / path
    return None


@pytest.mark.parametrize("page", pages())
def test_every_module_that_a_page_names_exists(page: str) -> None:
    beside = (ROOT / page).parent
    for word in quoted(prose(page)):
        if _PATH.fullmatch(word) and word.endswith(".py") and word not in new_files():
            assert file_of(word) or (beside / word).is_file(), f"{page}: there is no {word}"


def test_every_example_is_a_patch_followed_by_its_commands() -> None:
    sequence = [block.language for block in blocks(PAGE)]
    assert sequence == ["diff", "bash"] * len(PATCHES)
    assert len(PATCHES) == 4


def apply(patch: Block, tree: Path, *options: str) -> None:
    done = subprocess.run(
        ["git", "apply", *options, "-"],
        cwd=tree,
        input=patch.text,
        capture_output=True,
        text=True,
        # Outside a repository, so that a copy within another one is patched as well.
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)},
        check=False,
    )
    assert done.returncode == 0, f"{patch.name} no longer fits the tree:\n{done.stderr}"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_every_patch_fits_the_tree(patch: Block) -> None:
    apply(patch, ROOT, "--check")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("index", range(len(PATCHES)))
def test_every_example_passes_its_commands(index: int, tmp_path: Path) -> None:
    tree = fresh_copy(tmp_path / "tree")
    apply(PATCHES[index], tree)
    for line in COMMANDS[index].text.splitlines():
        program, *arguments = line.split()
        assert program == "python"
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert "pytest" not in arguments or " passed" in done.stdout
