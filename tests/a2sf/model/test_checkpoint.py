"""Broken checkpoints give a one-sentence error before weights are read; harmless extras pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from a2sf.errors import NotFound, Unsupported
from a2sf.model import checkpoint as checkpoints
from a2sf.model.loader import load_model
from tests.broken import BROKEN, INV_FREQ, added, both, config, sharded, weights
from tests.driving import engine_for, prompts, request, run, tokens


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "checkpoint"))


@pytest.fixture
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_sentence_before_its_weights_are_read(
    name: str, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    BROKEN[name].change(checkpoint)
    with pytest.raises((NotFound, Unsupported)) as caught:
        load_model(str(checkpoint), device="cpu")
    message = str(caught.value)
    assert BROKEN[name].message in message
    assert "checkpoint" in message
    assert "\n" not in message
    assert len(message) < 800
    assert capfd.readouterr().err == "", "an error is one line"


def repeat_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def head_alone(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def frequencies(dtype: torch.dtype) -> torch.Tensor:
    return (10000.0 ** -(torch.arange(4) / 4)).to(dtype)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

HARMLESS: dict[str, Callable[[Path], None]] = {
    "an output head equal to the embeddings": weights(repeat_head),
    "an output head in place of the embeddings": weights(head_alone),
    "frequencies in float32": added(INV_FREQ, frequencies(torch.float32)),
    "frequencies in bfloat16": added(INV_FREQ, frequencies(torch.bfloat16)),
    "frequencies in float16": added(INV_FREQ, frequencies(torch.float16)),
    "two shards": sharded(lambda *_: None),
    "no settings of generation": lambda d: (d / "generation_config.json").unlink(),
    "no quantisation": config(quantization_config=None),
    "an older name of the dtype": config(dtype=..., torch_dtype="float32"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_differences_are_accepted(
    name: str, checkpoint: Path, tiny_model_dir: Path
) -> None:
    HARMLESS[name](checkpoint)
    plain, model = (load_model(str(d), dtype="float64") for d in (tiny_model_dir, checkpoint))
    answers = []
    for loaded in (plain, model):
        engine = engine_for(loaded)
        engine.submit(request("r", prompts(1, low=20)[0]))
        answers.append(tokens(run(engine)["r"]))
    assert answers[0] == answers[1]
    assert plain.identity.fingerprint == model.identity.fingerprint


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_stored_frequencies_may_be_with_or_without_scaling(scale: float, checkpoint: Path) -> None:
    both(config(rope_parameters=LINEAR), added(INV_FREQ, frequencies(torch.float32) / scale))(
        checkpoint
    )
    load_model(str(checkpoint), device="cpu")
    added(INV_FREQ, frequencies(torch.float32) / 2)(checkpoint)
    with pytest.raises(Unsupported, match=r"is not the rotation that config\.json describes"):
        load_model(str(checkpoint), device="cpu")


def test_only_the_padding_token_may_be_beyond_the_vocabulary(checkpoint: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(checkpoint)
    assert tokenizer.pad_token_id == 258
    assert load_model(str(checkpoint), device="cpu").shape.vocab_size == 258
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(Unsupported, match="has token '<more>' of id 259, and vocab_size is 258"):
        load_model(str(checkpoint), device="cpu")


def test_headers_are_read_without_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(3, 4, dtype=torch.bfloat16)}, path)
    assert checkpoints.headers([path]) == {"x": checkpoints.Stored(path, (3, 4), "BF16")}


def test_transformers_warnings_are_restored_after_reading(checkpoint: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    load_model(str(checkpoint), device="cpu")
    (checkpoint / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(NotFound):
        load_model(str(checkpoint), device="cpu")
    assert logging.get_verbosity() == before
    assert logging.is_progress_bar_enabled()


def test_a_failure_at_the_first_token_is_one_sentence(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes\nof all kinds")

    monkeypatch.setattr("a2sf.model.loader._try_out", fail)
    with pytest.raises(
        Unsupported, match=r"cannot read a token .RuntimeError: shapes of all kinds"
    ):
        load_model(str(checkpoint), device="cpu")


def test_a_tensor_that_transformers_drops_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("a2sf.model.checkpoint.check", lambda *_: None)
    with pytest.raises(NotFound, match=r"weights are unexpected: .*q_proj\.bias"):
        load_model(str(checkpoint), device="cpu")
