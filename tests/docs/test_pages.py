"""What the pages tell a reader to type works: each block runs as a file from a fresh copy."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.blocks import NOT_RUN, RUN, SHOWN, Block, blocks, pages, reasons
from tests.docs.shell import Shell, fresh_copy

BLOCKS = [block for page in pages() for block in blocks(page)]
TYPED = [block for block in BLOCKS if block.language in RUN]
RUN_HERE = [block for block in TYPED if not reasons(block)]

SHORTER: tuple[tuple[str, str, str], ...] = (
    # A fit and a comparison of their usual sizes take minutes each.
    (
        "README.md",
        "--out tables/recall.json",
        "--trials 2 --examples 4 --length 128 --out tables/recall.json",
    ),
    ("README.md", "--ratios .1,.2,.4,.6", "--examples 2 --length 128 --ratios .1,.2"),
    (
        "docs/tuner.md",
        "--out tables/recall.json",
        "--trials 2 --examples 4 --out tables/recall.json",
    ),
    ("docs/tuner.md", "--shots 0,1", "--examples 2 --shots 0,1"),
    ("docs/tuner.md", "--within 1%", "--examples 4 --within 1%"),
    # A name that stands for the reader's own model.
    ("docs/tensor-parallel.md", "--model M", "--model reference --threads 1"),
)
"""Page, what a block says, and what is run instead."""

_COMMAND = re.compile(
    r"^\s*(\$ )?(python3?|pip|make|a2sf-\w+|docker|kubectl|grpcurl|npm|torchrun|export|serve) ",
    re.MULTILINE,
)


def named(block: Block) -> str:
    return block.name


def test_every_block_names_a_language_that_is_run_or_only_shown() -> None:
    assert len(TYPED) > 20
    wrong = [block.name for block in BLOCKS if block.language not in (*RUN, *SHOWN)]
    assert not wrong, f"{wrong}: begin the block with ```bash, ```python or ```text"


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "text"], ids=named
)
def test_no_command_hides_in_a_block_that_is_only_shown(block: Block) -> None:
    assert not _COMMAND.search(block.text)


def test_every_reason_not_to_run_a_block_belongs_to_one() -> None:
    for page, start, _ in NOT_RUN:
        assert any(block.page == page and re.match(start, block.text) for block in TYPED), (
            f"{page} has no block that begins with {start}"
        )
    for block in TYPED:
        assert len(reasons(block)) <= 1, block.name


def test_commands_that_tests_shorten_are_on_the_page() -> None:
    for page, said, _ in SHORTER:
        assert any(said in block.text for block in RUN_HERE if block.page == page), (page, said)


@pytest.mark.parametrize("block", TYPED, ids=named)
def test_a_block_can_be_read_as_a_file(block: Block) -> None:
    if block.language == "python":
        compile(block.text, block.name, "exec")
    else:
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", sorted({block.page for block in RUN_HERE}))
def test_every_block_of_a_page_runs_in_its_order(
    page: str, tmp_path: Path, data_dir: Path, request: pytest.FixtureRequest
) -> None:
    tree, scratch = fresh_copy(tmp_path / "tree"), tmp_path / "scratch"
    scratch.mkdir()
    # What stands for the reader's data.
    (tree / "path" / "to").mkdir(parents=True)
    (tree / "path" / "to" / "data").symlink_to(data_dir)
    if page == "docs/gguf.md":
        (tree / "models").symlink_to(request.getfixturevalue("real_gguf").parent)
    with Shell(tree, scratch) as shell:
        # README tells how an environment is made; the other pages take it for granted.
        if page != "README.md":
            shell.activate()
        for block in RUN_HERE:
            if block.page == page:
                shell.run(shorter(block))


def shorter(block: Block) -> Block:
    text = block.text
    for page, said, instead in SHORTER:
        if page == block.page:
            text = text.replace(said, instead)
    return Block(block.page, block.line, block.language, text)
