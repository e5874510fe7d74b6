"""The fenced blocks of the project's pages, and which of them are not run by `test_pages.py`."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

RUN = ("bash", "python")
"""Languages of what a reader types, or saves as a file. Each such block runs, or is in NOT_RUN."""

SHOWN = ("console", "diff", "json", "text", "yaml")
"""Languages of what a page only shows."""

NOT_RUN: tuple[tuple[str, str, str], ...] = (
    (
        "CONTRIBUTING.md",
        "python",
        "tests code that the page's patches add; tests/docs/test_contributing.py runs it",
    ),
    ("README.md", "make demo", "installs for minutes; tests/test_end_to_end.py runs the demo"),
    ("docs/tuner.md", "make real-model", "fits for 35 minutes"),
    (
        "docs/tuner.md",
        r"pip install 'a2sf-serve\[eval\]'",
        "my_tasks stands for the reader's; the tests of the harness run it on a task file",
    ),
    (
        "docs/clients.md",
        "(import asyncio|from (service|pathlib))",
        "tests/service/client/test_docs.py runs it on a server with a chat template",
    ),
    ("docs/clients.md", "grpcurl", "grpcurl is no Python package"),
    ("docs/containers.md", "docker", "needs a container engine; tests/docker checks its names"),
    ("docs/kubernetes.md", "kubectl", "needs a cluster; tests/docker checks its names"),
    (
        "docs/ray.md",
        "python|export",
        "starts a cluster of Ray, for minutes; tests/service/ray_serve/test_ray.py starts one",
    ),
    (
        "examples/node/README.md",
        "npm",
        "npm fetches packages; tests/service/test_languages.py runs it",
    ),
    ("training/README.md", "export", "trains for days"),
)
"""Page, pattern of how a block begins, and why it is not run here."""


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[str]:
    """Every page of the tree, by its path, but for the changelog."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [path for path in listed.stdout.splitlines() if path != "CHANGELOG.md"]


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start()].count("\n") + 1, found[1], found[2])
        for found in _FENCE.finditer(text)
    ]


def reasons(block: Block) -> list[str]:
    """Why a block is not run: what NOT_RUN says of it."""
    return [
        why for page, start, why in NOT_RUN if page == block.page and re.match(start, block.text)
    ]
