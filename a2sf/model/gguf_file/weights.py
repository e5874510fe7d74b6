"""The weights of a GGUF file, unpacked, under their names in transformers.

Owns names and layout. Knows nothing of settings.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from a2sf.errors import NotFound, Unsupported
from a2sf.model.gguf_file.header import Header
from a2sf.model.gguf_file.settings import ARCHITECTURES, ROPE_FACTORS


def places(name: str, header: Header, module: Any) -> dict[str, str]:
    """Return the name in `module` (which may be on the meta device) of each of the file's tensors.

    Raises:
        Unsupported: a tensor has no place in the module.
        NotFound: a tensor is missing or has another shape.
    """
    config, wanted = module.config, module.state_dict()
    names = _names(header.settings["general.architecture"], config.num_hidden_layers)
    found = {}
    for stored, tensor in header.tensors.items():
        if stored == ROPE_FACTORS:
            continue
        base, _, suffix = stored.rpartition(".")
        place = f"{names.get(base)}.{suffix}"
        if place not in wanted:
            raise Unsupported(
                f"model {name!r}: the file holds a tensor {stored}, which has no place in a "
                f"{config.architectures[0]}"
            )
        if tensor.shape != tuple(wanted[place].shape):
            raise NotFound(
                f"model {name!r}: tensor {stored} has shape {list(tensor.shape)}, and the file's "
                f"settings make it {list(wanted[place].shape)}"
            )
        found[stored] = place
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := sorted(wanted.keys() - set(found.values()) - tied):
        raise NotFound(f"model {name!r}: weights are missing: {', '.join(missing)}")
    return found


def state_dict(
    header: Header, config: Any, where: Mapping[str, str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Unpack all weights to `dtype`, one tensor at a time, under the names from `places`."""
    architecture = ARCHITECTURES[header.settings["general.architecture"]]
    weights = {}
    for stored, place in where.items():
        values = header.read(stored)
        # A tensor stored as float32 is a read-only view of the file.
        tensor = torch.from_numpy(values if values.flags.writeable else np.array(values))
        if architecture.interleaved:
            if ".attn_q." in stored:
                tensor = _halves(tensor, config.num_attention_heads)
            elif ".attn_k." in stored:
                tensor = _halves(tensor, config.num_key_value_heads)
        weights[place] = tensor.to(dtype)
    return weights


def _halves(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder a projection's rows for transformers: the first halves of pairs, then the second.

    llama.cpp rotates adjacent numbers of a head, so a file stores row i of the first half next to
    row i of the second half.
    """
    paired = stored.reshape(heads, -1, 2, *stored.shape[1:])
    return paired.transpose(1, 2).reshape(stored.shape)


def _names(architecture: str, layers: int) -> dict[str, str]:
    """Name in the file -> name in transformers, both without `.weight` and `.bias`."""
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
