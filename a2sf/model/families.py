"""The supported model families, and the settings that are refused by name.

Owns the list of families, the settings that the block law cannot honour (windows, chunks, rotations
that depend on the batch), the plans by which several processes may share a model, and the arguments
that a layer may pass to its attention. Reads settings as plain values; knows nothing of loading or
of transformers.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from a2sf.errors import Unsupported
from a2sf.model.checkpoint import FLOATS

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "Ernie4_5ForCausalLM",
    "GemmaForCausalLM",
    "GlmForCausalLM",
    "Glm4ForCausalLM",
    "HeliumForCausalLM",
    "MistralForCausalLM",
    "OlmoForCausalLM",
    "Olmo2ForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
)
"""Families whose logits equal those of transformers; the tests run over this list."""

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations that depend only on the position. The others (dynamic, longrope) choose their factors
by the longest position in the batch, so one request would change another's logits."""

_ONE_WINDOW = frozenset({"MistralForCausalLM", "Phi3ForCausalLM"})
"""Families whose layers all use the window `sliding_window` and ignore `layer_types`."""

_SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)

ROTATE_IN_PART = frozenset(
    {"GlmForCausalLM", "Glm4ForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"}
)
"""Families whose default rotation reads `partial_rotary_factor`; the others rotate whole heads."""

_WITHOUT_EFFECT = frozenset({"position_ids", "cache_position", "use_cache"})
"""Attention arguments without effect: queries and keys are already rotated, the cache is ours."""

_SWITCHED_OFF: dict[str, object] = {"dropout": 0.0, "output_attentions": False}
"""Attention arguments that have no effect at this value. None has no effect for any argument."""


def refuse_by_name(name: str, settings: Mapping[str, Any]) -> None:
    """Raise Unsupported for other families, quantised weights and missing or invalid sizes.

    Args:
        name: the name under which the user asked for the model, for messages.
        settings: the content of config.json.
    """
    named = settings.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise Unsupported(
            f"model {name!r} is a {architecture or 'model of no named architecture'}; supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    quantised = settings.get("quantization_config") or settings.get("compression_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise Unsupported(
            f"model {name!r} is quantised ({method or 'by no named method'}); supported: weights "
            f"of {', '.join(FLOATS.values())}; use the checkpoint that is not quantised"
        )
    _refuse_sizes(name, {size: settings[size] for size in _SIZES if size in settings})
    if settings.get("transformers_weights") is not None:
        raise Unsupported(
            f"model {name!r} names its weights in transformers_weights of config.json; supported: "
            "model.safetensors or model.safetensors.index.json; rename the file and remove the "
            "setting"
        )


def refuse_unsupported(name: str, config: Any) -> None:
    """Raise Unsupported, naming the model and the reason, for settings that we cannot honour.

    Args:
        name: the name under which the user asked for the model, for messages.
        config: its settings, a transformers configuration.
    """
    _refuse_sizes(name, {size: getattr(config, size, None) for size in _SIZES})
    architecture = config.architectures[0]
    if not getattr(config, "is_causal", True) or getattr(
        config, "use_bidirectional_attention", None
    ):
        raise Unsupported(f"model {name!r} attends in both directions; supported: causal models")
    rope = config.rope_parameters
    if not isinstance(rope, dict):
        raise Unsupported(f"model {name!r} has rope settings {rope!r}; accepted: an object")
    # Some families have one rotation per kind of layer; their settings are one level deeper.
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    for kind in kinds:
        rope_type = kind.get("rope_type", "default")
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise Unsupported(
                f"model {name!r} uses rope type {rope_type!r}, whose factors depend on the batch; "
                f"supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
            )
        _refuse_numbers(name, kind)
        part = kind.get("partial_rotary_factor", 1.0)
        if rope_type != "default" and part != 1 and architecture not in ROTATE_IN_PART:
            raise Unsupported(
                f"model {name!r} rotates {part} of each head, which a {architecture} does not; "
                "accepted: partial_rotary_factor 1"
            )
    _refuse_partial_views(name, config)


def _refuse_sizes(name: str, sizes: Mapping[str, Any]) -> None:
    for size, value in sizes.items():
        # These two may be derived from other settings.
        if size in ("head_dim", "num_key_value_heads") and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Unsupported(
                f"model {name!r} has {size} {value!r} in config.json; accepted: 1 or more"
            )
    heads, kv_heads = sizes.get("num_attention_heads"), sizes.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise Unsupported(
            f"model {name!r} has {heads} attention heads for {kv_heads} KV heads in config.json; "
            "accepted: a multiple of the KV heads"
        )
    hidden = sizes.get("hidden_size")
    if heads and hidden and not sizes.get("head_dim") and hidden % heads:
        raise Unsupported(
            f"model {name!r} has hidden_size {hidden} for {heads} attention heads and no head_dim "
            "in config.json; accepted: a multiple of the attention heads"
        )


def _refuse_numbers(name: str, rope: Mapping[str, Any]) -> None:
    for setting in ("rope_theta", "factor", "partial_rotary_factor"):
        value = rope.get(setting, 1.0)
        if setting == "factor" and value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf"):
            raise Unsupported(
                f"model {name!r} has {setting} {value!r} in its rope settings; accepted: a number "
                "above 0"
            )


def _refuse_partial_views(name: str, config: Any) -> None:
    window = getattr(config, "sliding_window", None)
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    if kinds is None or config.architectures[0] in _ONE_WINDOW:
        slides = window is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    if len(kinds) != config.num_hidden_layers:
        raise Unsupported(
            f"model {name!r} has {len(kinds)} layer_types for {config.num_hidden_layers} layers in "
            "config.json; accepted: one per layer"
        )
    for kind in dict.fromkeys(kinds):
        layers = _spans([index for index, other in enumerate(kinds) if other == kind])
        if kind == "full_attention":
            continue
        if kind != "sliding_attention":
            raise Unsupported(
                f"model {name!r} uses {kind} in layers {layers}; supported: full_attention"
            )
        if not _sees_everything(window, config):
            size = f"{window} tokens" if window else "no stated size"
            raise Unsupported(
                f"model {name!r} uses a sliding window of {size} in layers {layers}; a cache that "
                "evicts by score does not honour it; supported: the same model without one"
            )


def refuse_undivided(name: str, config: Any) -> None:
    """Raise Unsupported if several processes cannot share the model.

    In the plan of transformers for the family, each process must project its own heads' output.
    """
    plan = config.base_model_tp_plan or {}
    outputs = [how for part, how in plan.items() if re.search(r"self_attn\.(o_proj|dense)$", part)]
    if not outputs or not set(outputs) <= {"rowwise", "rowwise_split_input"}:
        raise Unsupported(
            f"model {name!r} is a {config.architectures[0]}, for which transformers has no "
            "tensor-parallel plan that divides the heads; serve it with one process"
        )


def refuse_effects(layer: int, config: Any, arguments: Mapping[str, Any]) -> None:
    """Raise Unsupported for an attention argument whose effect is not implemented.

    Args:
        layer: the layer's index.
        config: the model's settings.
        arguments: the layer's arguments to attention, without tensors, mask and scale.
    """
    for name, value in arguments.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name in _SWITCHED_OFF and value == _SWITCHED_OFF[name]:
            continue
        if name == "sliding_window" and _sees_everything(value, config):
            continue
        raise Unsupported(
            f"layer {layer} attends with {name!r}, which is not implemented here; supported: "
            "causal attention with a scale"
        )


def _sees_everything(window: int | None, config: Any) -> bool:
    # Admission limits every text to max_position_embeddings, so a window of that size covers it.
    return window is not None and window >= int(config.max_position_embeddings)


def _spans(indices: Sequence[int]) -> str:
    """Format ascending indices as ranges: 0-3, 5, 7-8."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and spans[-1][-1] == index - 1:
            spans[-1][1:] = [index]
        else:
            spans.append([index])
    return ", ".join("-".join(map(str, span)) for span in spans)
