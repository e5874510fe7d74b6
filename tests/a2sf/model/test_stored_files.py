"""The same model loads from any form of its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from a2sf.errors import NotFound
from a2sf.model.loader import load_model
from tests.driving import engine_for, prompts, request, run, tokens
from tests.families import edit, save
from tests.tiny import EOS


def test_the_fingerprint_does_not_depend_on_sharding_or_loaded_dtype(
    architecture: str, tmp_path: Path
) -> None:
    def fingerprint(name: str, dtype: str = "auto", **options: Any) -> str:
        directory = save(architecture, tmp_path / name, **options)
        return load_model(str(directory), device="cpu", dtype=dtype).identity.fingerprint

    original = fingerprint("whole")
    assert fingerprint("loaded", dtype="bfloat16") == original
    assert fingerprint("sharded", shard="20KB") == original
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint("other", seed=1) != original


def test_a_fused_projection_is_fingerprinted_in_every_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save("Phi3ForCausalLM", tmp_path)
    before = load_model(str(tmp_path), device="cpu").identity.fingerprint
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.2.self_attn.qkv_proj.weight"][0, 0] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(tmp_path), device="cpu").identity.fingerprint != before
    del weights["model.layers.2.self_attn.qkv_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFound, match=r"missing: model\.layers\.2\.self_attn\.qkv_proj\.weight"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("tie", [True, False])
def test_a_sharded_checkpoint_equals_the_whole_one(
    architecture: str, tie: bool, tmp_path: Path
) -> None:
    whole, sharded = (
        load_model(
            str(save(architecture, tmp_path / name, tie_word_embeddings=tie, shard=shard)),
            dtype="float64",
        )
        for name, shard in (("whole", "1GB"), ("sharded", "10KB"))
    )
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    # In float64, weights are not packed, so the module shows all of them.
    state = whole.module.state_dict()
    assert len(state) > 20
    for name, weight in sharded.module.state_dict().items():
        assert torch.equal(weight, state[name])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save("Qwen3ForCausalLM", tmp_path, shard="10KB")
    shard = max(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(NotFound, match=f"missing: {shard.name}"):
        load_model(str(tmp_path), device="cpu")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(NotFound, match=r"model\.safetensors\.index\.json cannot be read"):
        load_model(str(tmp_path), device="cpu")


def test_a_bfloat16_checkpoint_can_run_in_float32_on_a_processor(
    architecture: str, tmp_path: Path
) -> None:
    save(architecture, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    model = load_model(str(tmp_path), device="cpu")
    assert model.dtype == torch.float32
    for weight in model.module.parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weight.bfloat16().float())
    engine = engine_for(model)
    engine.submit(request("r", prompts(1, low=10)[0], max_new_tokens=3))
    assert len(tokens(run(engine)["r"])) == 3


def test_several_end_of_sequence_tokens_are_read(tmp_path: Path) -> None:
    save("Qwen2ForCausalLM", tmp_path)
    edit(tmp_path / "generation_config.json", eos_token_id=[EOS, 3], pad_token_id=4)
    assert load_model(str(tmp_path), device="cpu").eos_token_ids == {EOS, 3}


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_is_found_in_any_file(where: str, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    save("Qwen2ForCausalLM", tmp_path)
    if where.endswith(".json"):
        edit(tmp_path / where, chat_template=template)
    else:
        (tmp_path / where).write_text(template)
    assert load_model(str(tmp_path), device="cpu").tokenizer.chat_template == template
