"""Makes the peers' environments from pinned requirements, and prepares commands to run in them.

Owns `build/peers/`: the environments and the models exported for OpenVINO. Knows nothing of what is
measured.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from .variants import Environment

HERE = Path(__file__).parent
STORE = HERE.parents[1] / "build" / "peers"

# Only the version without its local suffix; it must resolve to the same build for every peer.
TORCH = f"torch=={torch.__version__.split('+')[0]}"


def python(name: Environment, store: Path = STORE) -> str:
    """Return an environment's interpreter.

    Makes the environment if it is missing or its pins changed.
    """
    if name == "project":
        return sys.executable
    folder = store / name
    interpreter = folder / "bin" / "python"
    requirements = [HERE / f"{name}.txt", HERE / f"{name}-no-deps.txt"]
    present = [path for path in requirements if path.exists()]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in present)).hexdigest()
    stamp = folder / ".installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return str(interpreter)
    print(f"making the environment of {name} in {folder}", file=sys.stderr)
    _call(sys.executable, "-m", "venv", "--clear", str(folder))
    pip = (str(interpreter), "-m", "pip", "install", "--quiet")
    # torch first and alone, so that no peer installs another build.
    _call(*pip, TORCH)
    for path in present:
        _call(*pip, *(["--no-deps"] if path.stem.endswith("-no-deps") else []), "-r", str(path))
    stamp.write_text(wanted)
    return str(interpreter)


def model_for(name: Environment, model: Path, key: str, store: Path = STORE) -> Path:
    """Return the model in the form that an environment's peer loads."""
    if name != "openvino":
        return model
    exported = store / "models" / f"{key}-ir"
    if not (exported / "openvino_model.bin").exists():
        draft = exported.with_name(exported.name + ".draft")
        print(f"exporting {model} for OpenVINO", file=sys.stderr)
        _call(
            *command("openvino", "export_openvino", (str(model), str(draft)), store),
            environment=surroundings(),
        )
        draft.rename(exported)
    return exported


def command(
    name: Environment, module: str, arguments: tuple[str, ...], store: Path = STORE
) -> list[str]:
    """Return the command that runs a module of this package in an environment."""
    return [python(name, store), "-m", f"peers.{module}", *arguments]


def surroundings(threads: int | None = None) -> dict[str, str]:
    """Environment variables of a worker: this package on its path, and no downloads."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if threads is not None:
        variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return variables


def _call(*arguments: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        arguments, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        last = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"{' '.join(arguments[1:4])}: {' '.join(last)[:400]}")
