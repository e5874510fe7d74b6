"""Writes GGUF files from tiny checkpoints, as llama.cpp's converter does.

Owns the inverse of `a2sf.model.gguf_file`, with separate formulas.
"""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, PreTrainedConfig

from tests.tiny import BOS, BYTES, EOS, save_tiny

MERGES = ["Ċ Ċ", "1 2", "Ġ 1", "t h", "th e", "Ġ the", "Ġ Ġ"]
TOKENS = [
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    "<bos>",
    "<eos>",
    *(merge.replace(" ", "") for merge in MERGES),
    "<think>",
]
VOCABULARY = 272
"""Rows of the embedding; some have no token."""

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6

TEMPLATE = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def save_checkpoint(
    directory: Path, family: type[PreTrainedConfig] = LlamaConfig, **settings: Any
) -> Path:
    """Write a tiny checkpoint whose rows are multiples of 32 numbers, the quantisation block."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
    return save_tiny(family, directory, vectors=0.3, **{**sizes, "head_dim": 16, **settings})


def save_gguf(
    checkpoint: Path,
    path: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    tensors: dict[str, np.ndarray[Any, Any] | None] | None = None,
    **settings: Any,
) -> Path:
    """Write the checkpoint as a GGUF file.

    Args:
        checkpoint: directory of a tiny checkpoint.
        path: the file to write.
        kind: the type of all matrices; vectors are always float32.
        tensors: additional tensors; None removes one.
        settings: override the checkpoint's; `__` stands for a dot, None removes one.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    stored = {**stored_tensors(checkpoint, config, architecture), **(tensors or {})}
    said = {**described(config, architecture, kind), **vocabulary()}
    said |= {key.replace("__", "."): value for key, value in settings.items()}
    writer = gguf.GGUFWriter(path, said.pop("general.architecture"))
    for key, value in said.items():
        if value is not None:
            add(writer, key, value)
    for name, values in stored.items():
        if values is None:
            continue
        whole = values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        used = kind if whole else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def stored_tensors(
    checkpoint: Path, config: dict[str, Any], architecture: str
) -> dict[str, np.ndarray[Any, Any] | None]:
    """The checkpoint's tensors in float32, by GGUF's names and in its layout."""
    (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    stored: dict[str, np.ndarray[Any, Any] | None] = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            tensor = interleave(tensor, heads[part])
        stored[names.get_name(name, (".weight", ".bias"))] = tensor.float().numpy()
    rope = config["rope_parameters"]
    if rope["rope_type"] == "llama3":
        stored["rope_freqs.weight"] = llama3_factors(rope, config["head_dim"])
    return stored


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Move row i of a head's second half next to row i of its first half."""
    halves = tensor.view(heads, 2, -1, *tensor.shape[1:])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(tensor.shape).contiguous()


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """The divisor of each frequency, computed one by one."""
    factors = []
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def described(
    config: dict[str, Any], architecture: str, kind: GGMLQuantizationType
) -> dict[str, Any]:
    rope = config["rope_parameters"]
    said = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.file_type": gguf.LlamaFileType[
            "ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"
        ].value,
    }
    own = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        own["rope.scaling.type"] = rope["rope_type"]
        own["rope.scaling.factor"] = float(rope["factor"])
        own["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    return said | {f"{architecture}.{key}": value for key, value in own.items()}


def vocabulary() -> dict[str, Any]:
    assert TOKENS[BOS : EOS + 1] == ["<bos>", "<eos>"]
    types = [NORMAL] * len(TOKENS)
    types[BOS] = types[EOS] = CONTROL
    types[TOKENS.index("<think>")] = USER_DEFINED
    padding = [f"[PAD{index}]" for index in range(len(TOKENS), VOCABULARY)]
    assert len(TOKENS) == BYTES + 2 + len(MERGES) + 1
    said = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*TOKENS, *padding],
        "token_type": [*types, *[UNUSED] * len(padding)],
        "merges": MERGES,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in said.items()} | {
        "tokenizer.chat_template": TEMPLATE
    }
