"""A model's fingerprint, which ties an alpha table to a model.

Owns the digest over a model's settings in canonical form and the first bytes of every layer's key
projection as stored on disk. So it does not depend on the spelling of the configuration, on the
dtype in which the model is loaded, or on sharding. Knows nothing of transformers.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from a2sf.errors import Unsupported
from a2sf.model.checkpoint import Stored
from a2sf.tablefile import canonical_json

BYTES_A_WEIGHT = 4096

_KEY_PROJECTION = re.compile(r"\.layers\.(\d+)\.self_attn\.(?:k_proj|qkv_proj)\.weight$")

_ROTATION_SETTINGS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {"factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings"}
    ),
}
"""Settings of each rotation, besides its base, the rotated share of a head, and YaRN's scale."""

_DEFAULTS: dict[str, object] = {
    "partial_rotary_factor": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
}
"""Values of settings that are absent, null, or (the two betas) 0."""


def canonical_rotation(
    rope: Mapping[str, Any], max_context: int, *, partial: bool
) -> dict[str, Any]:
    """Return a rotation's settings in canonical form: equal forms compute the same rotation.

    Numbers are floats; a number of positions is an integer. Settings with their default value are
    left out, and so are settings that the rotation does not read, such as `type` in older files.

    Args:
        rope: the settings as transformers reads them; if nested, by kind of layer.
        max_context: the model's context in tokens; YaRN without a factor reads it.
        partial: whether the family's default rotation reads `partial_rotary_factor`.
    """
    if any(isinstance(value, Mapping) for value in rope.values()):
        return {
            kind: canonical_rotation(value, max_context, partial=partial)
            for kind, value in rope.items()
            if isinstance(value, Mapping)
        }
    given = {name: value for name, value in rope.items() if value is not None}
    if "truncate" in rope:
        given["truncate"] = bool(rope["truncate"])
    rope_type = given.get("rope_type") or given.get("type") or "default"
    reads = {"rope_theta", *_ROTATION_SETTINGS[rope_type]}
    if partial or rope_type != "default":
        reads.add("partial_rotary_factor")
    if rope_type == "yarn":
        given.setdefault(
            "factor", max_context / given.get("original_max_position_embeddings", max_context)
        )
        scale = _yarn_scale(given)
        if not math.isclose(scale, _magnitude(given["factor"], 1.0), rel_tol=1e-9):
            # The last digits of a logarithm differ between machines.
            reads.add("attention_factor")
            given["attention_factor"] = float(f"{scale:.9g}")
    found = {name: _canonical(name, value) for name, value in given.items() if name in reads}
    kept = {
        name: value
        for name, value in found.items()
        if value != _DEFAULTS.get(name) and not (name.startswith("beta_") and not value)
    }
    if rope_type == "linear" and kept.get("factor") == 1.0:
        # A linear factor of 1 changes nothing.
        del kept["factor"]
        rope_type = "default"
    return {**kept, "rope_type": rope_type}


def _canonical(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(value) if name == "original_max_position_embeddings" else float(value)


def _yarn_scale(rope: Mapping[str, Any]) -> float:
    """Return the factor on queries and keys (arXiv 2309.00071, section 3.4), as in transformers."""
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if over and under:
        return _magnitude(rope["factor"], over) / _magnitude(rope["factor"], under)
    return _magnitude(rope["factor"], 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _earlier_spellings(
    rope: Mapping[str, Any], canonical: Mapping[str, Any], *, partial: bool
) -> Iterator[Mapping[str, Any]]:
    """Yield other spellings of one rotation: older versions hashed the spelling of the file.

    These are the file's own spelling and the common variants: whole numbers as integers or floats,
    with and without the older key `type`, with and without a `partial_rotary_factor` of 1.
    """
    yield rope
    if any(isinstance(value, Mapping) for value in rope.values()):
        return
    choices: list[list[dict[str, Any]]] = [
        [{name: value}, {name: int(value)}]
        if isinstance(value, float) and value.is_integer()
        else [{name: value}]
        for name, value in canonical.items()
    ]
    choices.append([{}, {"type": canonical["rope_type"]}])
    if partial and "partial_rotary_factor" not in canonical:
        choices.append([{}, {"partial_rotary_factor": 1.0}])
    for parts in product(*choices):
        yield {name: value for part in parts for name, value in part.items()}


def fingerprints(
    sizes: Mapping[str, Any],
    rope: Mapping[str, Any],
    starts: Mapping[int, bytes],
    *,
    num_layers: int,
    max_context: int,
    partial: bool,
) -> tuple[str, ...]:
    """Return a model's fingerprint, then the fingerprints that older versions gave it.

    Each is the SHA-256 (hex) over the settings as canonical JSON, followed by the first bytes of
    the layers' key projections, in order.

    Args:
        sizes: the model's shape, as JSON values.
        rope, max_context, partial: as for `canonical_rotation`.
        starts: by layer, the result of `key_starts`.
        num_layers: the model's number of layers.

    Raises Unsupported if `starts` lacks a layer.
    """
    if sorted(starts) != list(range(num_layers)):
        raise Unsupported(
            f"k_proj or qkv_proj weights found for layers {sorted(starts)} of {num_layers}"
        )
    canonical = canonical_rotation(rope, max_context, partial=partial)
    found: dict[str, None] = {}
    for spelling in (canonical, *_earlier_spellings(rope, canonical, partial=partial)):
        digest = hashlib.sha256(canonical_json({**sizes, "rope": spelling}).encode())
        for layer in sorted(starts):
            digest.update(starts[layer])
        found[digest.hexdigest()] = None
    return tuple(found)


def key_starts(stored: Mapping[str, Stored]) -> dict[int, bytes]:
    """Read the first 4 KiB of each layer's k_proj weight as stored, by layer.

    A family that stores queries, keys and values in one tensor (Phi-3) has no k_proj: there we read
    the first 4 KiB of qkv_proj, which hold queries. `stored` are the safetensors files' tensors.
    """
    places: dict[Path, dict[int, str]] = {}
    for name, tensor in stored.items():
        if match := _KEY_PROJECTION.search(name):
            places.setdefault(tensor.path, {})[int(match[1])] = name
    found: dict[int, bytes] = {}
    for path, names in places.items():
        with safe_open(path, framework="pt") as file:
            found |= {layer: _first_bytes(file.get_slice(name)) for layer, name in names.items()}
    return found


def _first_bytes(stored: Any) -> bytes:
    _, columns = stored.get_shape()
    # A stored element has at least one byte, so these rows always hold enough bytes.
    rows: Tensor = stored[: -(-BYTES_A_WEIGHT // columns)]
    return bytes(rows.contiguous().view(torch.uint8).flatten()[:BYTES_A_WEIGHT].numpy())
