"""Settings that the block law cannot honour are refused by name."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, GraniteConfig

from a2sf.errors import Unsupported
from a2sf.model import families
from a2sf.model.loader import load_model
from tests.families import edit, save
from tests.tiny import save_tiny

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 128,
    "factor": 4.0,
}


@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        (
            "MistralForCausalLM",
            {"sliding_window": 64},
            "window of 64 tokens in layers 0-2; a cache",
        ),
        ("Phi3ForCausalLM", {"sliding_window": 511}, "window of 511 tokens in layers 0-2;"),
        (
            "Qwen2ForCausalLM",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 1,
                "layer_types": None,
            },
            "window of 64 tokens in layers 1-2; a cache that evicts by score does not honour it; "
            "supported: the same model without one",
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "window of 64 tokens in layers 0, 2;",
        ),
        (
            "SmolLM3ForCausalLM",
            {"sliding_window": 64, "use_sliding_window": True, "layer_types": None},
            "window of 64 tokens in layers 1;",
        ),
        (
            "Qwen2ForCausalLM",
            {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            "window of no stated size in layers 0;",
        ),
        (
            "Qwen2ForCausalLM",
            {"layer_types": ["full_attention", "chunked_attention", "chunked_attention"]},
            "uses chunked_attention in layers 1-2; supported: full_attention",
        ),
        # Phi-3 and Mistral do not read layer_types.
        *(
            (
                architecture,
                {"sliding_window": 64, "layer_types": ["full_attention"] * 3},
                "window of 64 tokens in layers 0-2;",
            )
            for architecture in ("MistralForCausalLM", "Phi3ForCausalLM")
        ),
        ("Phi3ForCausalLM", {"rope_parameters": LONGROPE}, "rope type 'longrope', whose factors"),
        (
            "Qwen2ForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic', whose factors depend on the batch; supported: default, linear",
        ),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "attends in both directions"),
        ("LlamaForCausalLM", {"is_causal": False}, "attends in both directions"),
        (
            "Qwen2ForCausalLM",
            {"architectures": ["LlamaForCausalLM"]},
            "calls itself a LlamaForCausalLM, but its model_type 'qwen2' makes it a Qwen2",
        ),
    ],
)
def test_settings_that_would_be_computed_wrongly_are_refused_by_name(
    architecture: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    save(architecture, tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(Unsupported) as caught:
        load_model(str(tmp_path), device="cpu")
    assert says in str(caught.value)
    assert tmp_path.name in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 64, "use_sliding_window": False, "layer_types": None},
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
        {"sliding_window": 512, "use_sliding_window": True, "layer_types": None},
    ],
    ids=["off", "in no layer", "as long as the context"],
)
def test_a_window_without_effect_is_accepted(changes: dict[str, Any], tmp_path: Path) -> None:
    save("Qwen2ForCausalLM", tmp_path, max_window_layers=0)
    edit(tmp_path / "config.json", **changes)
    assert load_model(str(tmp_path), device="cpu").shape.max_context == 512


@pytest.mark.parametrize("config", [Gemma2Config, GraniteConfig])
def test_a_family_that_is_not_listed_is_refused_by_name(config: Any, tmp_path: Path) -> None:
    save_tiny(config, tmp_path, head_dim=8)
    name = config.__name__.replace("Config", "ForCausalLM")
    with pytest.raises(Unsupported, match=f"is a {name}; supported: LlamaForCausalLM, .*Qwen3"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("softcap", 30.0),
        ("s_aux", torch.zeros(4)),
        ("dropout", 0.1),
        ("sliding_window", 511),
        ("is_causal", False),
        ("output_attentions", True),
        ("never_heard_of", 0),
    ],
)
def test_an_argument_with_an_effect_is_refused_in_any_layer(argument: str, value: object) -> None:
    config = SimpleNamespace(max_position_embeddings=512)
    with pytest.raises(Unsupported, match=f"layer 3 attends with '{argument}'"):
        families.refuse_effects(3, config, {"dropout": 0.0, argument: value})


def test_arguments_without_an_effect_are_accepted() -> None:
    families.refuse_effects(
        0,
        SimpleNamespace(max_position_embeddings=512),
        {
            "dropout": 0.0,
            "output_attentions": False,
            "softcap": None,
            "s_aux": None,
            "sliding_window": 512,
            "position_ids": torch.zeros(1, 1),
            "use_cache": False,
        },
    )


def test_layers_are_listed_as_ranges() -> None:
    rng = random.Random(0)
    assert families._spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    for _ in range(20):
        layers = sorted(rng.sample(range(12), rng.randint(1, 12)))
        read = [span.split("-") for span in families._spans(layers).split(", ")]
        assert layers == [n for span in read for n in range(int(span[0]), int(span[-1]) + 1)]
