"""Models load from complete checkpoints of supported families; everything else is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from a2sf.errors import InvalidArgument, NotFound, Unsupported
from a2sf.model.loader import LoadedModel, load_model
from tests.tiny import BOS, EOS, save_tiny_llama


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "checkpoint"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_loaded_checkpoint_has_the_right_identity_and_shape(tiny_model: LoadedModel) -> None:
    shape = tiny_model.shape
    assert (shape.num_layers, shape.num_attention_heads, shape.num_kv_heads) == (3, 4, 2)
    assert (shape.head_dim, shape.vocab_size, shape.max_context) == (8, 258, 512)
    assert tiny_model.eos_token_ids == {EOS}
    assert tiny_model.identity.architecture == "LlamaForCausalLM"
    assert tiny_model.dtype == torch.float32


def test_the_fingerprint_depends_on_the_stored_weights_and_the_rotation(
    tiny_model_dir: Path, checkpoint: Path, tmp_path: Path
) -> None:
    def fingerprint(directory: Path, **options: Any) -> str:
        return load_model(str(directory), device="cpu", **options).identity.fingerprint

    original = fingerprint(tiny_model_dir)
    assert fingerprint(checkpoint, dtype="bfloat16") == original
    assert fingerprint(save_tiny_llama(tmp_path / "other", seed=1)) != original
    config = json.loads((checkpoint / "config.json").read_text())
    edit(
        checkpoint / "config.json",
        rope_parameters={**config["rope_parameters"], "rope_theta": 5e5},
    )
    assert fingerprint(checkpoint) != original


def test_sharding_does_not_change_the_fingerprint(
    tiny_model: LoadedModel, tmp_path: Path, tiny_model_dir: Path
) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_model_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(
        tmp_path, max_shard_size="20KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded = load_model(str(tmp_path), device="cpu")
    assert sharded.identity.fingerprint == tiny_model.identity.fingerprint


def test_eos_tokens_come_from_settings_and_tokenizer(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", eos_token_id=7)
    edit(checkpoint / "generation_config.json", eos_token_id=[3, 0])
    assert load_model(str(checkpoint), device="cpu").eos_token_ids == {7, 3, 0, EOS}
    # Token 0 is a valid id, and a negative number means none.
    edit(checkpoint / "config.json", eos_token_id=-1)
    edit(checkpoint / "generation_config.json", eos_token_id=0)
    edit(checkpoint / "tokenizer_config.json", eos_token=None)
    assert load_model(str(checkpoint), device="cpu").eos_token_ids == {0}


def test_a_bos_token_is_not_added_twice(reference_model: LoadedModel) -> None:
    begin = reference_model.tokenizer.bos_token
    first = reference_model.tokenizer.bos_token_id
    assert reference_model.encode(f"{begin}a") == reference_model.encode("a")
    # A text with two gets two; without special tokens the text does not change.
    assert reference_model.encode(f"{begin}{begin}a")[:3].count(first) == 2
    assert reference_model.encode(f"{begin}a", special=False)[:2].count(first) == 1


def test_a_bos_token_is_added_if_the_tokenizer_adds_one(reference_model: LoadedModel) -> None:
    assert reference_model.encode("a")[0] == reference_model.tokenizer.bos_token_id
    assert BOS not in reference_model.encode("a")[1:]


@pytest.mark.parametrize("name", ["no/such/directory", "./nothing", "org/name", "nobody-has-this"])
def test_a_missing_model_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFound, match=name) as caught:
        load_model(name)
    assert "reference" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=tmp_path.name):
        load_model(str(tmp_path))


def test_pickled_weights_are_not_read(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(NotFound, match=r"no \*\.safetensors"):
        load_model(str(checkpoint))


def test_truncated_weights_are_named(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(NotFound, match=r"model\.safetensors"):
        load_model(str(checkpoint))


def test_an_unsupported_family_is_refused_by_name(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", architectures=["GPT2LMHeadModel"])
    with pytest.raises(Unsupported, match="is a GPT2LMHeadModel; supported: LlamaForCausalLM"):
        load_model(str(checkpoint))


def test_a_rotation_that_depends_on_the_batch_is_refused_by_name(checkpoint: Path) -> None:
    edit(
        checkpoint / "config.json",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    )
    with pytest.raises(Unsupported, match="rope type 'dynamic'"):
        load_model(str(checkpoint))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int8"}, "accepted: auto, float64"),
        ({"device": "tpu"}, "accepted: auto, cpu, cuda"),
    ],
)
def test_an_unknown_device_or_dtype_is_refused(
    tiny_model_dir: Path, options: dict[str, str], says: str
) -> None:
    with pytest.raises(InvalidArgument, match=says):
        load_model(str(tiny_model_dir), **options)


@pytest.mark.parametrize(
    ("found", "asked", "says"),
    [
        (0, "cuda", "torch finds is 0; accepted here: auto, cpu$"),
        (2, "cuda:2", "torch finds is 2; accepted here: auto, cpu, cuda, cuda:0, cuda:1$"),
    ],
)
def test_a_cuda_device_that_is_not_there_is_refused_with_those_that_are(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, found: int, asked: str, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(InvalidArgument, match=says):
        load_model(str(tiny_model_dir), device=asked, dtype="float32")


def test_a_checkpoint_without_all_weights_is_refused(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFound, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(checkpoint))
