"""Broken or unsupported checkpoints, each made from a complete tiny one by one change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD = "model-00001-of-00002.safetensors"


class Broken(NamedTuple):
    """A change to a checkpoint, and the expected part of the error message."""

    change: Callable[[Path], None]
    message: str


def config(**changes: Any) -> Callable[[Path], None]:
    """Change settings in config.json; the value ... removes a setting."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        settings = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Overwrite a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data) and None


def removed(*names: str) -> Callable[[Path], None]:
    """Remove files."""
    return lambda directory: [(directory / name).unlink() for name in names] and None


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """Make several changes."""
    return lambda directory: [change(directory) for change in changes] and None


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Change the stored tensors."""

    def rewrite(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def added(name: str, tensor: Tensor) -> Callable[[Path], None]:
    """Add or replace a stored tensor."""
    return weights(lambda tensors: tensors.__setitem__(name, tensor))


def cut(length: int) -> Callable[[Path], None]:
    """Truncate the weight file; a negative number is the number of removed bytes."""

    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])

    return change


def sharded(change: Callable[[Path, dict[str, Any]], None]) -> Callable[[Path], None]:
    """Split the weights into two files with an index, then change them."""

    def split(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        names = sorted(tensors)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
        for number, half in enumerate(halves, 1):
            file = f"model-0000{number}-of-00002.safetensors"
            save_file({n: tensors[n] for n in half}, directory / file, metadata={"format": "pt"})
            index["weight_map"] |= dict.fromkeys(half, file)
        change(directory, index)
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return split


def half_a_shard(directory: Path, _: dict[str, Any]) -> None:
    path = directory / SHARD
    path.write_bytes(path.read_bytes()[:-100])


def gptq(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj"
    del tensors[f"{name}.weight"]
    tensors[f"{name}.qweight"] = torch.zeros(4, 32, dtype=torch.int32)
    tensors[f"{name}.scales"] = torch.zeros(1, 32)


def fp8(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(1)


def biases(tensors: dict[str, Tensor]) -> None:
    for layer in range(3):
        for part, width in (("q", 32), ("k", 16), ("v", 16)):
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = torch.ones(width)


def without_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


QUANTISED = ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "mxfp4", "never_heard_of")

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"

BROKEN: dict[str, Broken] = {
    **{
        f"quantised by {method}": Broken(
            config(quantization_config={"quant_method": method, "bits": 4, "group_size": 128}),
            f"is quantised ({method}); supported: weights of float64, float32, bfloat16, float16",
        )
        for method in QUANTISED
    },
    "quantised by nobody": Broken(
        config(quantization_config={"load_in_4bit": True}), "is quantised (by no named method)"
    ),
    "quantised, an older key": Broken(
        config(compression_config={"quant_method": "compressed-tensors"}),
        "is quantised (compressed-tensors)",
    ),
    "quantised, no object": Broken(config(quantization_config="gptq"), "is quantised (gptq)"),
    "quantised weights without settings": Broken(weights(gptq), "q_proj.qweight as I32"),
    "fp8 weights without settings": Broken(weights(fp8), "q_proj.weight as F8_E4M3"),
    "integer weights": Broken(
        added(K_PROJ, torch.ones(16, 32, dtype=torch.int8)), f"stores {K_PROJ} as I8"
    ),
    "biases without attention_bias": Broken(
        weights(biases), "model.layers.0.self_attn.k_proj.bias, "
    ),
    "many biases": Broken(
        weights(biases), " and 4 more; accepted: only the weights of the model that"
    ),
    "biases that are missing": Broken(
        config(attention_bias=True), "weights are missing: model.layers.0.self_attn.k_proj.bias"
    ),
    "scales": Broken(
        added("model.layers.0.self_attn.q_proj.weight_scale", torch.ones(1)), "q_proj.weight_scale"
    ),
    "leftovers of an adapter": Broken(
        added("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(2, 32)),
        "lora_A.weight; accepted: only the weights of the model that config.json describes",
    ),
    "an adapter": Broken(
        written("adapter_config.json", '{"base_model_name_or_path": "x"}'),
        "comes with an adapter (adapter_config.json); supported: weights with the adapter merged "
        "into them",
    ),
    "fewer layers": Broken(config(num_hidden_layers=2), "no place for: model.layers.2."),
    "more layers": Broken(config(num_hidden_layers=4), "weights are missing: model.layers.3."),
    "no prefix": Broken(weights(without_prefix), "no place for: embed_tokens.weight, "),
    "a buffer of masks": Broken(
        added("model.layers.0.self_attn.masked_bias", torch.ones(1)), "self_attn.masked_bias"
    ),
    "an output head that is not the embeddings": Broken(
        added("lm_head.weight", torch.ones(258, 32)),
        "but stores two that differ; accepted: equal ones, one of them, or tie_word_embeddings",
    ),
    "an output head that is missing": Broken(
        config(tie_word_embeddings=False), "weights are missing: lm_head.weight"
    ),
    "another rotation stored": Broken(
        added(INV_FREQ, 500000.0 ** -(torch.arange(4) / 4)),
        f"stores {INV_FREQ}, which is not the rotation that config.json describes",
    ),
    "a weight of another shape": Broken(
        added(K_PROJ, torch.ones(32, 32)), f"{K_PROJ} is [32, 32], expected [16, 32]"
    ),
    "another hidden size": Broken(config(hidden_size=64), "of other shapes than config.json says"),
    "another vocabulary": Broken(config(vocab_size=300), "is [258, 32], expected [300, 32]"),
    "another head_dim": Broken(config(head_dim=16), "of other shapes than config.json says"),
    "another number of KV heads": Broken(
        config(num_key_value_heads=4), "is [16, 32], expected [32,"
    ),
    "a weight that is missing": Broken(
        weights(lambda tensors: tensors.pop(K_PROJ)), f"weights are missing: {K_PROJ}"
    ),
    "weights cut short": Broken(cut(-100), "model.safetensors: truncated or damaged"),
    "weights cut within the header": Broken(cut(100), "model.safetensors: truncated or damaged"),
    "empty weights": Broken(cut(0), "model.safetensors: truncated or damaged"),
    "weights that are text": Broken(
        written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "model.safetensors: truncated or damaged",
    ),
    "pickled weights": Broken(
        lambda directory: (
            (directory / "model.safetensors").rename(directory / "pytorch_model.bin") and None
        ),
        "no *.safetensors",
    ),
    "a shard cut short": Broken(sharded(half_a_shard), f"{SHARD}: truncated or damaged"),
    "a shard that is not there": Broken(
        sharded(lambda directory, _: (directory / SHARD).unlink()), f"are missing: {SHARD}"
    ),
    "an index of other files": Broken(
        sharded(lambda _, index: index["weight_map"].update(more="nowhere.safetensors")),
        "are missing: nowhere.safetensors",
    ),
    "an index that leads outside": Broken(
        sharded(lambda _, index: index["weight_map"].update(more="../other.safetensors")),
        "accepted: files in the same directory",
    ),
    "an index without a map": Broken(
        sharded(lambda _, index: index.pop("weight_map")), "index.json cannot be read (KeyError"
    ),
    "an index of numbers": Broken(
        sharded(lambda _, index: index["weight_map"].update(more=7)), "index.json cannot be read"
    ),
    "an index that is a list": Broken(
        both(sharded(lambda *_: None), written("model.safetensors.index.json", "[]")),
        "index.json cannot be read",
    ),
    "an index of no files": Broken(
        sharded(lambda _, index: index["weight_map"].clear()),
        "accepted: files in the same directory",
    ),
    "a tensor in two shards": Broken(
        sharded(
            lambda directory, _: save_file(
                load_file(directory / SHARD) | load_file(directory / SHARD.replace("1-", "2-")),
                directory / SHARD,
                metadata={"format": "pt"},
            )
        ),
        f"is stored in {SHARD} too",
    ),
    "no settings": Broken(removed("config.json"), "no config.json in"),
    "settings that are not JSON": Broken(written("config.json", "{"), "config.json cannot be read"),
    "settings that are a list": Broken(written("config.json", "[]"), "is not a JSON object"),
    "settings that are not text": Broken(
        written("config.json", b"\xff\xfe{"), "config.json cannot be read"
    ),
    "settings nested without end": Broken(
        written("config.json", "[" * 100_000), "config.json cannot be read (RecursionError"
    ),
    "NaN": Broken(config(rms_norm_eps=float("nan")), "NaN is not JSON"),
    "infinity": Broken(
        config(rope_parameters={"rope_type": "default", "rope_theta": float("inf")}),
        "Infinity is not JSON",
    ),
    "no architecture": Broken(config(architectures=...), "is a model of no named architecture"),
    "an architecture that is a word": Broken(
        config(architectures="GPT2LMHeadModel"), "is a GPT2LMHeadModel; supported: LlamaForCausalLM"
    ),
    "an architecture that is a number": Broken(config(architectures=[7]), "is a 7; supported:"),
    "an architecture that is an object": Broken(config(architectures=[{}]), "supported: LlamaFor"),
    "an unknown family": Broken(
        config(architectures=["NewForCausalLM"], model_type="new"), "is a NewForCausalLM; supported"
    ),
    "an unknown model_type": Broken(config(model_type="new"), "config.json cannot be read (ValueE"),
    "no model_type": Broken(config(model_type=...), "config.json cannot be read (ValueError"),
    "a model_type that is a number": Broken(config(model_type=7), "config.json cannot be read"),
    "another model_type": Broken(
        config(model_type="qwen2"), "calls itself a LlamaForCausalLM, but its model_type 'qwen2'"
    ),
    "weights named in the settings": Broken(
        config(transformers_weights="other.safetensors"), "names its weights in transformers_weig"
    ),
    "a size that is a word": Broken(config(hidden_size="wide"), "hidden_size"),
    "a size that is a fraction": Broken(config(hidden_size=32.5), "hidden_size"),
    "a size that is null": Broken(config(vocab_size=None), "vocab_size"),
    "no heads": Broken(config(num_attention_heads=0), "num_attention_heads 0 in config.json"),
    "no KV heads": Broken(config(num_key_value_heads=0), "num_key_value_heads 0 in config.json"),
    "no layers": Broken(config(num_hidden_layers=0), "num_hidden_layers 0 in config.json"),
    "fewer than no layers": Broken(config(num_hidden_layers=-1), "num_hidden_layers -1 in config"),
    "no width of heads": Broken(config(head_dim=0), "head_dim"),
    "no context": Broken(config(max_position_embeddings=0), "max_position_embeddings"),
    "heads that KV heads do not divide": Broken(
        config(num_key_value_heads=3), "4 attention heads for 3 KV heads in config.json; accepted:"
    ),
    "heads that do not divide the hidden size": Broken(
        config(num_attention_heads=5, num_key_value_heads=5, head_dim=None), "attention heads"
    ),
    "an unknown activation": Broken(config(hidden_act="nonsense"), "config.json cannot be read"),
    "rope settings that are a list": Broken(
        config(rope_parameters=[1]), "config.json cannot be read"
    ),
    "rope settings that are a word": Broken(
        config(rope_parameters="yarn"), "config.json cannot be read"
    ),
    "a base that is a word": Broken(
        config(rope_parameters={"rope_type": "default", "rope_theta": "big"}), "rope_theta 'big'"
    ),
    "a base of 0": Broken(
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta 0 in its"
    ),
    "a factor that is missing": Broken(
        config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "factor"
    ),
    "a factor that is a word": Broken(
        config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}),
        "factor 'x' in its rope settings",
    ),
    "a rope type that is a number": Broken(
        config(rope_parameters={"rope_type": 7, "rope_theta": 1e4}), "7"
    ),
    "half of a rotated pair": Broken(
        config(
            rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
            | {"partial_rotary_factor": 0.5}
        ),
        "rotates 0.5 of each head, which a LlamaForCausalLM does not",
    ),
    "layer types of fewer layers": Broken(
        config(
            model_type="qwen2", architectures=["Qwen2ForCausalLM"], layer_types=["full_attention"]
        ),
        "num_hidden_layers",
    ),
    "an unknown dtype": Broken(config(dtype="float3"), "config.json cannot be read"),
    "a dtype of integers": Broken(config(dtype="int8"), "has dtype torch.int8 in config.json"),
    "no tokenizer": Broken(removed("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "no tokenizer.json": Broken(removed("tokenizer.json"), "tokenizer"),
    "a tokenizer that is not JSON": Broken(
        written("tokenizer.json", "{"), "tokenizer cannot be read"
    ),
    "a tokenizer of nothing": Broken(written("tokenizer.json", "{}"), "tokenizer cannot be read"),
    "a tokenizer of an unknown kind": Broken(
        written("tokenizer.json", '{"model": {"type": "New"}}'), "tokenizer cannot be read"
    ),
    "tokenizer settings that are not JSON": Broken(
        written("tokenizer_config.json", "{"), "tokenizer cannot be read"
    ),
    "tokenizer settings that are a list": Broken(
        written("tokenizer_config.json", "[]"), "tokenizer cannot be read"
    ),
    "a vocabulary smaller than the tokenizer": Broken(
        both(
            config(vocab_size=257),
            weights(
                lambda tensors: tensors.update(
                    {
                        name: tensors[name][:257].contiguous()
                        for name in ("model.embed_tokens.weight",)
                    }
                )
            ),
        ),
        "its tokenizer has token '<eos>' of id 257, and vocab_size is 257 in config.json",
    ),
    "generation settings that are not JSON": Broken(
        written("generation_config.json", "{"), "generation_config.json cannot be read"
    ),
}
"""By their fault. All are refused with one sentence."""
