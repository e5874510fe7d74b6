"""A reader's shell: blocks of a page run as files in a fresh copy of the tree, one after another.

What one block exports, the next one finds, as in a terminal. A block that serves goes on until
`close`, as in a terminal of its own. Two things are changed: the port, because others may use 50051
on this machine, and `pip install` only finds what it would install.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.docs.blocks import ROOT, Block

PORT = "50051"
WAIT_S = 120.0
BLOCK_S = 400.0

_SERVES = re.compile(r"^(?:torchrun .*)?(?:python )?-m service(?! plan\b)\b(?!\.)", re.MULTILINE)
_ASKS = re.compile(r"\b(python -m service\.client|a2sf-client)\b(?!.*--target)")


def fresh_copy(target: Path) -> Path:
    """Copy what git would clone, with the changes of the working tree, to `target`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(source.readlink())
        elif source.exists():
            copy.write_bytes(source.read_bytes())
            copy.chmod(source.stat().st_mode)
    return target


class Shell:
    """Runs the blocks of one page; use it as a context manager."""

    def __init__(self, tree: Path, scratch: Path) -> None:
        """`tree` is a fresh copy; `scratch` gets the blocks as files and what servers print."""
        self._tree, self._scratch = tree, scratch
        self._server: subprocess.Popen[bytes] | None = None
        self._printed = scratch / "server.txt"
        self._saved = scratch / "exported.sh"
        self._saved.touch()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = str(free.getsockname()[1])
        programs = scratch / "bin"
        programs.mkdir()
        # The Python that an environment is made with, whatever this machine calls python3.
        (programs / "python3").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
        kept = {
            k: v for k, v in os.environ.items() if k.startswith(("PIP_", "OMP_", "LANG", "HOME"))
        }
        self._environment = {
            **kept,
            "PATH": f"{programs}{os.pathsep}/usr/bin:/bin",
            # The default of --port, as a reader may set it.
            "A2SF_PORT": self._port,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, block: Block) -> None:
        """Run one block; raises AssertionError with its output where it fails."""
        file = self._scratch / f"block-{block.line}.{'sh' if block.language == 'bash' else 'py'}"
        text = _ASKS.sub(rf"\1 --target 127.0.0.1:{PORT}", block.text).replace(PORT, self._port)
        text = text.replace("pip install", "pip install --quiet --dry-run")
        file.write_text(text, encoding="utf-8")
        run = f". {file}" if block.language == "bash" else f"python {file}"
        script = f"set -eo pipefail\n. {self._saved}\n{run}\nexport -p > {self._saved}\n"
        if block.language == "bash" and _SERVES.search(block.text):
            self._serve(block, script)
            return
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self._tree,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BLOCK_S,
            check=False,
        )
        assert done.returncode == 0, f"{block.name}\n{text}\n{done.stdout}"
        self._complete_environment()

    def close(self) -> None:
        """End the server, if one runs."""
        server, self._server = self._server, None
        if server is not None and server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(WAIT_S)

    def _serve(self, block: Block, script: str) -> None:
        # One terminal serves at a time: pages use the same port again.
        self.close()
        with self._printed.open("wb") as stream:
            self._server = subprocess.Popen(
                ["bash", "-c", script],
                cwd=self._tree,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until = time.monotonic() + WAIT_S
        while "\nserving " not in (printed := self._printed.read_text()):
            assert self._server.poll() is None, f"{block.name} ended\n{printed}"
            assert time.monotonic() < until, f"{block.name} does not serve\n{printed}"
            time.sleep(0.1)

    def activate(self) -> None:
        """Make an environment in the tree and activate it, as README tells."""
        self.run(Block("README.md", 0, "bash", "python3 -m venv .venv\n. .venv/bin/activate\n"))

    def _complete_environment(self) -> None:
        """Give an environment that a block has made what `pip install` would: these packages."""
        for site in self._tree.glob(".venv/lib/python*/site-packages"):
            packages = sysconfig.get_path("purelib")
            (site / "installed.pth").write_text(f"{self._tree}\n{packages}\n", encoding="utf-8")
            programs = site.parents[2] / "bin"
            for name in ("a2sf-client", "a2sf-serve", "a2sf-tune", "torchrun"):
                source = Path(sysconfig.get_path("scripts")) / name
                if not (programs / name).exists() and source.exists():
                    body = source.read_text(encoding="utf-8").split("\n", 1)[1]
                    (programs / name).write_text(f"#!{programs / 'python'}\n{body}")
                    (programs / name).chmod(0o755)
