"""A broken checkpoint ends `serve` and `plan` with one line and exit code 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from a2sf.errors import A2SFError
from a2sf.model.loader import load_model
from tests.broken import BROKEN, sharded
from tests.service.conftest import START_TIMEOUT_S
from tests.service.planning import planned, refused

SIZES = ("--device", "cpu", "--budget", 8, "--max-batch", 1)

# One of each kind: settings, quantisation, headers, shapes, tokenizer.
STARTED = (
    "quantised by gptq",
    "biases without attention_bias",
    "a weight of another shape",
    "no heads",
    "rope settings that are a list",
    "an unknown activation",
    "a tokenizer of nothing",
    "a vocabulary smaller than the tokenizer",
)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_plan_and_a_server_refuse_the_same_values_in_the_same_words(
    name: str, checkpoint: Path
) -> None:
    BROKEN[name].change(checkpoint)
    line = refused("--model", checkpoint, *SIZES)
    assert BROKEN[name].message in line
    with pytest.raises(A2SFError) as caught:
        load_model(str(checkpoint), device="cpu")
    assert line == f"error: {caught.value}\n"


def test_a_plan_needs_no_shard_though_an_index_lists_them(checkpoint: Path) -> None:
    sharded(lambda *_: None)(checkpoint)
    for shard in checkpoint.glob("*.safetensors"):
        shard.unlink()
    assert planned("--model", checkpoint, *SIZES)["weights"]["stored_parameters"] is None


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", STARTED)
def test_a_broken_checkpoint_fails_the_start_with_one_line(name: str, checkpoint: Path) -> None:
    BROKEN[name].change(checkpoint)
    ended = subprocess.run(
        [sys.executable, "-m", "service", "--port", "0", "--model", str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert BROKEN[name].message in line
