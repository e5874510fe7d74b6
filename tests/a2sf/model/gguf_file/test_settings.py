"""A file's settings become a configuration, and unsupported settings are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from a2sf.errors import NotFound, Unsupported
from a2sf.model.loader import load_model
from a2sf.model.spec import read_model_spec
from tests.gguf_files import save_checkpoint, save_gguf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"general__type": "adapter"}, "is of type adapter; supported: model"),
        ({"llama__expert_count": 8}, r"sets llama\.expert_count to 8, which is not supported"),
        ({"llama__attention__causal": False}, r"llama\.attention\.causal to False"),
        ({"llama__attention__head_count_kv": [2, 2, 2]}, r"head_count_kv for each layer"),
        ({"llama__attention__value_length": 8}, "values of 8 and keys of 16 numbers"),
        ({"llama__rope__dimension_count": 8}, "8 of 16 numbers of a head are rotated"),
        ({"llama__rope__scaling__type": "longrope"}, "scales its rotation of type 'longrope'"),
        (
            {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0},
            "does not state rope.scaling.original_context_length",
        ),
        ({"llama__attention__sliding_window": 64}, "a sliding window of 64 tokens in layers 0-2"),
        ({"llama__attention__head_count": 0}, r"sets llama\.attention\.head_count to 0"),
        ({"llama__block_count": "three"}, r"sets llama\.block_count to 'three'"),
        ({"llama__block_count": None}, r"has no llama\.block_count; is it only a vocabulary"),
        ({"llama__feed_forward_length": None}, "does not state its intermediate_size"),
    ],
    ids=str,
)
def test_unsupported_settings_are_refused_by_name(
    settings: dict[str, Any], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = save_gguf(checkpoint, tmp_path / "m.gguf", **settings)
    for read in (read_model_spec, load_model):
        with pytest.raises(Unsupported, match=says) as caught:
            read(str(path))
        assert "\n" not in str(caught.value)


def test_a_window_as_wide_as_the_context_is_served(checkpoint: Path, tmp_path: Path) -> None:
    path = save_gguf(checkpoint, tmp_path / "m.gguf", llama__attention__sliding_window=512)
    assert read_model_spec(str(path)).shape.max_context == 512


@pytest.mark.parametrize("architecture", ["falcon", "gemma2", "clip"])
def test_another_architecture_is_refused_by_name(
    architecture: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = save_gguf(checkpoint, tmp_path / "m.gguf", general__architecture=architecture)
    with pytest.raises(Unsupported, match=f"is a GGUF of {architecture}; supported: llama, qwen2"):
        load_model(str(path))


def test_factors_of_the_rotation_that_are_not_llama_3s_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("rope_freqs.weight", "rope_factors_long.weight"):
        tensors = {name: np.linspace(1, 9, 8, dtype=np.float32)}
        path = save_gguf(checkpoint, tmp_path / "m.gguf", tensors=tensors)
        with pytest.raises(Unsupported, match=rf"scales its rotation by {name}"):
            load_model(str(path))


def test_factors_of_one_scale_nothing(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = save_gguf(checkpoint, tmp_path / "m.gguf", tensors=tensors)
    assert load_model(str(path), device="cpu").module.config.rope_parameters["rope_type"] == (
        "default"
    )


def test_without_the_library_the_message_names_the_package_to_install(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_gguf(checkpoint, tmp_path / "m.gguf")
    monkeypatch.setattr("a2sf.model.gguf_file.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"install a2sf-serve\[gguf\]"):
        load_model(str(path))


def test_a_plan_reads_only_the_header(checkpoint: Path, tmp_path: Path) -> None:
    path = save_gguf(checkpoint, tmp_path / "m.gguf")
    spec = read_model_spec(str(path), device_type="cpu")
    assert (spec.shape.num_layers, spec.shape.num_kv_heads, spec.shape.vocab_size) == (3, 2, 272)
    # The weights are overwritten: a plan must not read them.
    from a2sf.model.gguf_file.header import Header

    first = min(tensor.start for tensor in Header("m", path).tensors.values())
    content = path.read_bytes()
    path.write_bytes(content[:first] + b"\xff" * (len(content) - first))
    assert read_model_spec(str(path), device_type="cpu").shape == spec.shape


def test_a_directory_without_any_model_says_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=tmp_path.name):
        load_model(str(tmp_path))
