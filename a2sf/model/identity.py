"""The identity of a loaded model, from its settings and the first bytes of its weights.

Owns the choice of the settings that are hashed; `fingerprint` owns the digest. Knows nothing of how
a model is loaded.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from a2sf.model import families
from a2sf.model.fingerprint import canonical_rotation, fingerprints
from a2sf.model.spec import shape_of
from a2sf.schema import LoadedIdentity


def identity_of(
    name: str,
    revision: str | None,
    config: Any,
    starts: Mapping[int, bytes],
    stored: Mapping[str, Any] = MappingProxyType({}),
) -> LoadedIdentity:
    """Return a model's identity.

    Args:
        name: the model's name, for people.
        revision: the hub revision, or None.
        config: the transformers configuration.
        starts: by layer, the first bytes of its key projection, from `fingerprint.key_starts`.
        stored: hashed in addition to the settings.
    """
    shape, architecture = shape_of(config), config.architectures[0]
    partial = architecture in families.ROTATE_IN_PART
    sizes = {"head_dim": shape.head_dim, "hidden_size": config.hidden_size}
    sizes["vocab_size"] = shape.vocab_size
    rope = canonical_rotation(config.rope_parameters, shape.max_context, partial=partial)
    fingerprint, *earlier = fingerprints(
        {
            "architecture": architecture,
            "num_layers": shape.num_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_kv_heads": shape.num_kv_heads,
            **sizes,
            **stored,
        },
        config.rope_parameters,
        starts,
        num_layers=shape.num_layers,
        max_context=shape.max_context,
        partial=partial,
    )
    return LoadedIdentity(
        id=name,
        revision=revision,
        architecture=architecture,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_kv_heads,
        fingerprint=fingerprint,
        earlier=tuple(earlier),
        settings=", ".join(f"{name} {value}" for name, value in {**sizes, **rope}.items()),
    )
