"""Builds and runs container images in a temporary directory, without a container engine.

Owns the calls of buildah, mmdebstrap and runc, and the removal of all that they made. Knows nothing
of what an image must do.
"""

import ast
import configparser
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


SUITE = "bookworm"
"""Debian's release, as in the Dockerfile's base."""


UNKNOWN_USER_ID = 12345
"""A user id that no file in the images defines."""


NAMESPACES = ("pid", "network", "ipc", "uts", "mount")


READY_S = 180.0


class Failed(Exception):
    """A failure, described in one sentence."""


class Workshop:
    """A directory with separate image storage, in which everything is made and removed."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._buildah = ("buildah", "--root", str(work / "images"), "--runroot", str(work / "run"))
        self._runc = ("runc", "--root", str(work / "runc"))
        self._containers = 0

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator["Workshop"]:
        """Yield a workshop in a new directory, which is removed afterwards."""
        work = Path(tempfile.mkdtemp(prefix="a2sf-image-test-"))
        # buildah keeps its caches there too.
        os.environ["TMPDIR"] = str(work / "tmp")
        (work / "tmp").mkdir()
        workshop = cls(work)
        try:
            yield workshop
        finally:
            run_command([*workshop._buildah, "rm", "--all"])
            run_command([*workshop._buildah, "rmi", "--all", "--force"])
            # The bind mount of the storage.
            subprocess.run(["umount", "--quiet", work / "images" / "overlay"], check=False)
            shutil.rmtree(work)

    def make_base(self, accelerator: str) -> None:
        """Make the image `base`: Debian with its Python."""
        packages = ["python3", "python3-venv", *(["python3-dev"] if accelerator == "cuda" else [])]
        include = f"--include={','.join(packages)}"
        run_command(["mmdebstrap", "--variant=apt", include, SUITE, str(self._work / "base.tar")])
        (self._work / "Base").write_text("FROM scratch\nADD base.tar /\n")
        run_command(
            [*self._buildah, "build", f"--file={self._work / 'Base'}", "--tag=base", self._work]
        )

    def build(self, target: str, accelerator: str, torch_index_url: str | None) -> None:
        """Build a target of the Dockerfile, with this machine's settings of pip."""
        settings, places = pip_settings()
        config = self._work / "pip.conf"
        config.write_text(settings)
        arguments = {"PYTHON_IMAGE": "localhost/base", "ACCELERATOR": accelerator}
        if torch_index_url is not None:
            arguments["TORCH_INDEX_URL"] = torch_index_url
        run_command(
            [
                *(*self._buildah, "build", "--isolation=chroot", "--network=host", "--layers"),
                # The OCI format has no health check.
                *("--format=docker", f"--secret=id=pip,src={config}"),
                *(f"--volume={place}:{place}:ro" for place in places),
                *(f"--build-arg={name}={value}" for name, value in arguments.items()),
                f"--file={ROOT / 'docker' / 'Dockerfile'}",
                *(f"--target={target}", f"--tag={target}", ROOT),
            ]
        )

    def sizes(self, target: str) -> str:
        """Return an image's size by layer, without compression."""
        layers = json.loads(self._inspected(target)["Manifest"])["layers"]
        sizes = [f"{layer['size'] / 1e6:.1f}" for layer in layers]
        return f"{sum(layer['size'] for layer in layers) / 1e6:.0f} MB ({' + '.join(sizes)})"

    def volume(self, target: str, path: str) -> dict[str, Path]:
        """Make a volume as an engine does, with the owner and mode of the image's directory."""
        with self._mounted(target) as root:
            there = (root / path.lstrip("/")).stat()
        place = self._work / "volume"
        place.mkdir()
        os.chown(place, there.st_uid, there.st_gid)
        place.chmod(there.st_mode & 0o7777)
        return {path: place}

    @contextmanager
    def container(self, target: str) -> Iterator[Any]:
        """Yield a function that runs the image with arguments and returns its output."""

        def run(arguments: Sequence[str], volumes: dict[str, Path] | None = None) -> str:
            command = self._bundle(root, target, arguments, volumes or {})
            return output_of(command)

        with self._mounted(target) as root:
            yield run

    @contextmanager
    def server(self, arguments: Sequence[str], volumes: dict[str, Path]) -> Iterator[Any]:
        """Yield a function that runs a command beside the healthy server.

        At the end the server must drain.
        """
        check = self._inspected("service")["Docker"]["config"]["Healthcheck"]["Test"][1:]
        with self._mounted("service") as root:
            command = self._bundle(root, "service", arguments, volumes)
            beside = [*self._runc, "exec", command[-1]]
            process = subprocess.Popen(command)
            try:
                deadline = time.monotonic() + READY_S
                while subprocess.run([*beside, *check], capture_output=True).returncode != 0:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise Failed("the service does not become healthy")
                    time.sleep(1)
                say("service: " + output_of([*beside, *check]).strip())
                yield lambda arguments: output_of([*beside, *arguments])
                run_command([*self._runc, "kill", command[-1], "TERM"])
                if process.wait(timeout=60) != 0:
                    raise Failed(f"the service ended with {process.returncode} after SIGTERM")
            finally:
                process.kill()
                process.wait()
                subprocess.run([*self._runc, "delete", "--force", command[-1]], check=False)

    def _inspected(self, target: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            output_of([*self._buildah, "inspect", "--type=image", target])
        )
        return found

    @contextmanager
    def _mounted(self, target: str) -> Iterator[Path]:
        container = output_of([*self._buildah, "from", target]).strip()
        try:
            yield Path(output_of([*self._buildah, "mount", container]).strip())
        finally:
            output_of([*self._buildah, "rm", container])

    def _bundle(
        self, root: Path, target: str, arguments: Sequence[str], volumes: dict[str, Path]
    ) -> list[str]:
        """Write runc's configuration; return its command, which ends with the container's name."""
        image = self._inspected(target)["Docker"]["config"]
        self._containers += 1
        bundle = self._work / f"bundle-{self._containers}"
        bundle.mkdir()
        scratch = ["nosuid", "nodev", "mode=1777"]
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": scratch},
            *(
                {"destination": path, "type": "bind", "source": str(place), "options": ["bind"]}
                for path, place in volumes.items()
            ),
        ]
        process = {
            "user": {"uid": UNKNOWN_USER_ID, "gid": 0},
            "args": [*image["Entrypoint"], *arguments],
            "env": image["Env"],
            "cwd": image["WorkingDir"] or "/",
            "capabilities": {},
            "noNewPrivileges": True,
        }
        (bundle / "config.json").write_text(
            json.dumps(
                {
                    "ociVersion": "1.0.2",
                    "process": process,
                    "root": {"path": str(root), "readonly": True},
                    "mounts": mounts,
                    "linux": {"namespaces": [{"type": kind} for kind in NAMESPACES]},
                }
            )
        )
        name = f"a2sf-image-test-{os.getpid()}-{self._containers}"
        return [*self._runc, "run", "--bundle", str(bundle), name]


def pip_settings() -> tuple[str, list[Path]]:
    """Return this pip's settings as the text of a pip.conf, and the paths that they name."""
    listed = output_of([sys.executable, "-m", "pip", "config", "list"]).splitlines()
    parser = configparser.RawConfigParser()
    places: set[Path] = set()
    # Reversed, because the first lines, from the environment, have the highest priority.
    for line in reversed(listed):
        key, value = line.split("=", 1)
        section, name = key.rsplit(".", 1)
        section = section.replace(":env:", "global")
        if not parser.has_section(section):
            parser.add_section(section)
        words = ast.literal_eval(value).split()
        parser.set(section, name, "\n".join(words))
        for word in words:
            place = Path(word.removeprefix("file://"))
            if place.is_absolute() and place.exists():
                # The files of an index are beside it.
                places.add(place.parent if place.name == "simple" else place)
    text = io.StringIO()
    parser.write(text)
    return text.getvalue(), sorted(places)


def run_command(command: Sequence[str | Path]) -> None:
    """Run a command with its output on our stderr; raises CalledProcessError."""
    subprocess.run(command, check=True, stdout=sys.stderr)


def output_of(command: Sequence[str | Path]) -> str:
    """Run a command and return its output; raises CalledProcessError."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def say(what: str) -> None:
    """Print a line without buffering."""
    print(what, flush=True)
