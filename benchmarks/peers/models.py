"""The models that the grid runs, as directories that every peer can load.

Owns their shapes, the writing of the random model, and the bytes of each, which the prediction
needs. Imports torch only for writing; knows nothing of the peers.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2sf.reference import path as reference_path
from scripts.real_model import real_model

ITEM_BYTES = {"float32": 4, "bfloat16": 2}

RANDOM = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Shape:
    """The sizes that determine a decode step's memory traffic."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_context: int

    @classmethod
    def read(cls, directory: Path) -> "Shape":
        """Read the shape from a model's configuration."""
        config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            vocabulary=config["vocab_size"],
            max_context=config["max_position_embeddings"],
        )

    @property
    def weights_read(self) -> int:
        """Number of weights that a decode step reads: all except the input embedding."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        norms = 2 * self.hidden
        return self.layers * (attention + mlp + norms) + self.hidden + self.vocabulary * self.hidden

    @property
    def token_slots(self) -> int:
        """Cache slots per token: layers x KV heads."""
        return self.layers * self.kv_heads

    def token_bytes(self, dtype: str) -> int:
        """Bytes of a token's keys and values."""
        return self.token_slots * 2 * self.head_dim * ITEM_BYTES[dtype]


MODELS = ("reference", "random", "smollm2")


def prepare(name: str, store: Path, layers: int | None = None) -> Path:
    """Return the directory of a model of `MODELS`; make it if it is missing."""
    if name == "reference":
        return reference_path()
    if name == "smollm2":
        return real_model()
    shape = RANDOM if layers is None else {**RANDOM, "num_hidden_layers": layers}
    directory = store / f"random-{shape['num_hidden_layers']}"
    if not (directory / "config.json").exists():
        _write_random(directory, shape)
    return directory


def _write_random(directory: Path, shape: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    draft = directory.with_name(directory.name + ".draft")
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(draft)
    # Every id of the tokenizer is in the vocabulary. Prompts are ids, so nothing else is needed.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference_path() / name, draft / name)
    draft.rename(directory)


def prompt(vocabulary: int, length: int) -> list[int]:
    """A deterministic prompt of token ids."""
    return [2 + (i * 7919 + 104729 * (i // 97)) % (vocabulary - 2) for i in range(length)]
