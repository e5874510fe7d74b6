"""The weights of a GGUF file, unpacked, under the names that transformers has for them.

Owns names and layout. Knows nothing of settings.
"""

from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from a2sf.errors import Unsupported
from a2sf.gguf_file.header import Header
from a2sf.gguf_file.settings import ROPE_FACTORS, architecture_of


def state_dict(
    name: str, header: Header, config: Any, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Unpack all weights to `dtype`, one tensor at a time.

    Raises Unsupported for a tensor that has no name in transformers.
    """
    architecture = architecture_of(name, header)
    names = _names(header.settings["general.architecture"], config.num_hidden_layers)
    weights = {}
    for stored in header.tensors:
        if stored == ROPE_FACTORS:
            continue
        base, _, suffix = stored.rpartition(".")
        if base not in names or suffix not in ("weight", "bias"):
            raise Unsupported(
                f"model {name!r}: the file holds a tensor {stored}, which has no place in a "
                f"{config.architectures[0]}"
            )
        values = header.read(stored)
        # What is stored as float32 is a read-only view of the file.
        tensor = torch.from_numpy(values if values.flags.writeable else np.array(values))
        if architecture.interleaved:
            if base.endswith("attn_q"):
                tensor = _halves(tensor, config.num_attention_heads)
            elif base.endswith("attn_k"):
                tensor = _halves(tensor, config.num_key_value_heads)
        weights[f"{names[base]}.{suffix}"] = tensor.to(dtype)
    return weights


def _halves(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of a projection back as transformers rotates them: first halves, then second.

    llama.cpp rotates neighbouring numbers of a head, so that it stores row i of the first half
    beside row i of the second.
    """
    paired = stored.reshape(heads, -1, 2, *stored.shape[1:])
    return paired.transpose(1, 2).reshape(stored.shape)


def _names(architecture: str, layers: int) -> dict[str, str]:
    """Names in transformers, by names in the file, both without `.weight` and `.bias`."""
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(arch, layers)
    ours = ["model.embed_tokens", "model.norm", "lm_head"]
    parts = [
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(f"self_attn.{part}" for part in ("q_norm", "k_norm")),
        *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
    ]
    ours += [f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts]
    return {stored: name for name in ours if (stored := known.get_name(name)) is not None}
