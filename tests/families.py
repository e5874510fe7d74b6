"""Small random models of every supported family, on disk."""

import json
from pathlib import Path
from typing import Any

import transformers

from tests.tiny import save_tiny

# Settings in which families differ from Llama and that their defaults leave out: biases, heads
# wider than hidden / heads (which is 8), clipping, layers without rotation, partial rotation.
SETTINGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "ApertusForCausalLM": {
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "ArceeForCausalLM": {"head_dim": 16, "attention_bias": True},
    "Ernie4_5ForCausalLM": {"head_dim": 16, "use_bias": True},
    "GemmaForCausalLM": {"head_dim": 16, "attention_bias": True},
    "GlmForCausalLM": {"head_dim": 16},
    "Glm4ForCausalLM": {"head_dim": 16},
    "HeliumForCausalLM": {"head_dim": 8, "attention_bias": True},
    "MistralForCausalLM": {"head_dim": 16, "sliding_window": None},
    "OlmoForCausalLM": {"attention_bias": True, "clip_qkv": 1.0},
    "Olmo2ForCausalLM": {"attention_bias": True},
    "PhiForCausalLM": {"qk_layernorm": True},
    "Phi3ForCausalLM": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
    "Qwen3ForCausalLM": {"head_dim": 16, "attention_bias": True},
    "SeedOssForCausalLM": {"head_dim": 16, "attention_out_bias": True},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0, 1], "attention_bias": True},
}


def config_class(architecture: str) -> Any:
    return getattr(transformers, architecture).config_class


def save(architecture: str, directory: Path, **options: Any) -> Path:
    settings = {**SETTINGS.get(architecture, {}), **options}
    return save_tiny(config_class(architecture), directory, vectors=0.3, **settings)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
