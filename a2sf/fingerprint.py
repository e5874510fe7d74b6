"""A model's fingerprint: what an alpha table is tied to.

Owns the digest over a model's canonical settings and the start of every layer's key projection as
stored on disk, so that it depends neither on the dtype a model is loaded in nor on how it is
sharded. Knows nothing of transformers.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from a2sf.errors import NotFound, Unsupported
from a2sf.tablefile import canonical_json

BYTES_A_WEIGHT = 4096

_KEY_PROJECTION = re.compile(r"\.layers\.(\d+)\.self_attn\.(?:k_proj|qkv_proj)\.weight$")


def fingerprint(settings: Mapping[str, Any], num_layers: int, weights: Sequence[Path]) -> str:
    """SHA-256 (hex) over `settings` as canonical JSON, then the layers' key projections in order.

    Of each layer the first 4 KiB of its k_proj weight count. A family that stores queries, keys and
    values as one (Phi-3) has none: there it is the first 4 KiB of qkv_proj, which hold queries.

    Args:
        settings: the model's shape and rope settings, as JSON values.
        num_layers: how many layers must be found.
        weights: the safetensors files.

    Raises:
        NotFound: a file is not whole.
        Unsupported: some layer stores neither k_proj nor qkv_proj.
    """
    found: dict[int, bytes] = {}
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    match = _KEY_PROJECTION.search(name)
                    if match:
                        found[int(match[1])] = _first_bytes(file.get_slice(name))
        except SafetensorError as error:
            raise NotFound(f"weights {path}: not whole ({error})") from error
    return digest(settings, num_layers, found)


def digest(settings: Mapping[str, Any], num_layers: int, starts: Mapping[int, bytes]) -> str:
    """SHA-256 (hex) over `settings`, then what each layer's key projection starts with, in order.

    Raises Unsupported where `starts` lacks a layer.
    """
    if sorted(starts) != list(range(num_layers)):
        raise Unsupported(
            f"k_proj or qkv_proj weights found for layers {sorted(starts)} of {num_layers}"
        )
    summed = hashlib.sha256(canonical_json(settings).encode())
    for layer in sorted(starts):
        summed.update(starts[layer])
    return summed.hexdigest()


def _first_bytes(stored: Any) -> bytes:
    _, columns = stored.get_shape()
    # No stored element is under one byte wide, so these rows always hold enough.
    rows: Tensor = stored[: -(-BYTES_A_WEIGHT // columns)]
    return bytes(rows.contiguous().view(torch.uint8).flatten()[:BYTES_A_WEIGHT].numpy())
