"""Converts a GGUF file's settings to a transformers configuration.

Owns the list of supported GGUF architectures, the meaning of their keys, and the settings that are
refused because the result would be wrong. An unknown key may change the result, so it is refused by
name. Knows nothing of tokens. The only tensor it reads are the rotation's factors, which are a
setting stored as a tensor.

The keys are documented in llama.cpp, the program for which GGUF was made
(gguf-py/gguf/constants.py and src/llama-model.cpp there).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from transformers import AutoConfig

from a2sf.errors import Unsupported
from a2sf.model.gguf_file.header import Header

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor with the divisors of the rotation's frequencies."""

_LLAMA3_ORIGINS = tuple(2**power for power in range(5, 18))
"""Candidates for the original context of a llama 3 rotation; 8192 in all published models."""


@dataclass(frozen=True)
class Architecture:
    """A GGUF architecture, as transformers knows it."""

    model_type: str
    class_name: str
    interleaved: bool = False
    """Whether rows of the query and key projections are interleaved in pairs, as in llama.cpp."""
    biases: tuple[tuple[str, str], ...] = ()
    """(setting, tensor): the setting is true if the first layer has a bias of this tensor."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        interleaved=True,
        biases=(("attention_bias", "attn_q"), ("mlp_bias", "ffn_up")),
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", biases=(("attention_bias", "attn_q"),)),
}
"""Architectures whose logits equal those of the transformers model; the tests check each."""

_SIZES = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
    }
)
_UNDERSTOOD = _SIZES | {
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
}


def architecture_of(name: str, header: Header) -> Architecture:
    """Return the file's architecture; `name` is the user's name for the model.

    Raises Unsupported, naming the architecture and the supported ones.
    """
    kind = header.settings.get("general.type", "model")
    if kind != "model":
        raise Unsupported(f"model {name!r}: {header.path.name} is of type {kind}; supported: model")
    found = header.settings.get("general.architecture", "nothing that it names")
    if found not in ARCHITECTURES:
        raise Unsupported(
            f"model {name!r} is a GGUF of {found}; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[found]


def configuration(name: str, header: Header) -> Any:
    """Return the transformers configuration of a file.

    Raises Unsupported for settings that would give wrong results.
    """
    architecture = architecture_of(name, header)
    prefix = f"{header.settings['general.architecture']}."
    stated = {
        key.removeprefix(prefix): value
        for key, value in header.settings.items()
        if key.startswith(prefix)
    }
    for key, value in stated.items():
        if key not in _UNDERSTOOD:
            raise Unsupported(
                f"model {name!r}: the file sets {prefix}{key} to {value!r}, which is not supported"
            )
        if isinstance(value, list):
            raise Unsupported(
                f"model {name!r}: the file sets {prefix}{key} for each layer; supported: one value "
                "for all layers"
            )
        if key in _SIZES and (not isinstance(value, int) or value < 1):
            raise Unsupported(
                f"model {name!r}: the file sets {prefix}{key} to {value!r}; accepted: 1 or more"
            )
    missing = {"block_count", "embedding_length", "attention.head_count"} - stated.keys()
    if missing or "token_embd.weight" not in header.tensors:
        what = ", ".join(f"{prefix}{key}" for key in sorted(missing)) or "token_embd.weight"
        raise Unsupported(f"model {name!r}: the file has no {what}; is it only a vocabulary?")
    heads, hidden = stated["attention.head_count"], stated["embedding_length"]
    head_dim = stated.get("attention.key_length", hidden // heads)
    if stated.get("attention.value_length", head_dim) != head_dim:
        raise Unsupported(
            f"model {name!r}: values of {stated['attention.value_length']} and keys of {head_dim} "
            "numbers; supported: equal sizes"
        )
    if stated.get("rope.dimension_count", head_dim) != head_dim:
        raise Unsupported(
            f"model {name!r}: {stated['rope.dimension_count']} of {head_dim} numbers of a head are "
            "rotated; supported in a GGUF file: all of them"
        )
    settings: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "num_hidden_layers": stated["block_count"],
        "hidden_size": hidden,
        "intermediate_size": stated.get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": stated.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": stated.get("context_length"),
        "rms_norm_eps": stated.get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(name, stated, head_dim, header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.settings.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.settings.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": None,
        "dtype": stored_dtype(header),
        **{
            setting: f"blk.0.{tensor}.bias" in header.tensors
            for setting, tensor in architecture.biases
        },
    }
    for key in ("intermediate_size", "max_position_embeddings", "rms_norm_eps"):
        if settings[key] is None:
            raise Unsupported(f"model {name!r}: the file does not state its {key}")
    config = AutoConfig.for_model(architecture.model_type, **settings)
    # Only families with a sliding window have this setting; a file that sets it is refused later.
    if window := stated.get("attention.sliding_window"):
        config.sliding_window, config.layer_types = window, None
        config.use_sliding_window = True
    return config


def stored_dtype(header: Header) -> str:
    """The dtype of the weights if the user asks for the stored dtype.

    For quantised blocks this is bfloat16, the dtype in which most models were trained.
    """
    types = {tensor.type for tensor in header.tensors.values()}
    if types == {GGMLQuantizationType.F32}:
        return "float32"
    if types <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16}:
        return "float16"
    return "bfloat16"


def _rope(name: str, stated: Mapping[str, Any], head_dim: int, header: Header) -> dict[str, Any]:
    theta = float(stated.get("rope.freq_base", 10000.0))
    scaling = stated.get("rope.scaling.type", "none")
    factor = float(stated.get("rope.scaling.factor", 1.0))
    stretched = [tensor for tensor in header.tensors if tensor.startswith("rope_factors")]
    if scaling not in ("none", "linear", "yarn") or stretched:
        what = f"of type {scaling!r}" if not stretched else f"by {', '.join(stretched)}"
        raise Unsupported(
            f"model {name!r} scales its rotation {what}; supported in a GGUF file: none, linear, "
            "yarn, and the factors of llama 3"
        )
    if ROPE_FACTORS in header.tensors:
        if scaling != "none":
            raise Unsupported(
                f"model {name!r} scales its rotation twice, by {ROPE_FACTORS} and as {scaling}"
            )
        return _llama3(name, header.read(ROPE_FACTORS), theta, head_dim)
    if scaling == "none" or factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    rope: dict[str, Any] = {"rope_type": scaling, "rope_theta": theta, "factor": factor}
    if scaling == "yarn":
        original = stated.get("rope.scaling.original_context_length")
        if original is None:
            raise Unsupported(
                f"model {name!r} scales its rotation as yarn and does not state "
                "rope.scaling.original_context_length"
            )
        rope["original_max_position_embeddings"] = original
    return rope


def _llama3(name: str, factors: Any, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the llama 3 settings that give `factors` [head_dim / 2]; llama.cpp stores only these.

    The formula is that of transformers' `_compute_llama3_parameters`. `low_freq_factor` and
    `high_freq_factor` are 1 and 4 in all published models, so we try no others.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if np.allclose(factors, 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    for original in _LLAMA3_ORIGINS:
        factor = float(factors.max())
        turns = original * frequencies / (2 * math.pi)
        smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        made = 1.0 / ((1.0 - smooth) / factor + smooth)
        if factors.shape == made.shape and np.allclose(factors, made, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise Unsupported(
        f"model {name!r} scales its rotation by {ROPE_FACTORS}, which are not llama 3's factors"
    )
