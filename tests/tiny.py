"""Tiny random models with a byte-level tokenizer, saved as real checkpoints."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

BYTES = 256
BOS, EOS = BYTES, BYTES + 1


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that multi-byte characters span several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def save_tiny(
    config_class: type[PreTrainedConfig],
    directory: Path,
    *,
    seed: int = 0,
    vectors: float = 0.0,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a random GQA model of any family and its tokenizer to `directory`.

    Args:
        config_class: the family.
        directory: the output directory.
        seed: the seed of the weights.
        vectors: standard deviation of the noise on biases and norms, which start as zeros and ones.
        dtype: the dtype of the stored weights.
        shard: the most bytes in one file.
        overrides: the family's settings.
    """
    settings: dict[str, Any] = {
        "vocab_size": BYTES + 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": True,
        # Larger than usual: attention is peaked, so evictions change the tokens.
        "initializer_range": 0.4,
        **overrides,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**settings))
    if vectors:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=vectors)
    model.to(dtype).save_pretrained(directory, safe_serialization=True, max_shard_size=shard)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_tiny_llama(directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random GQA Llama and its tokenizer to `directory`."""
    return save_tiny(LlamaConfig, directory, seed=seed, **{"head_dim": 8, **overrides})


def save_poisoned_llama(
    directory: Path, token: int, *, value: float = torch.nan, seed: int = 0, **overrides: Any
) -> Path:
    """As `save_tiny_llama`, with an embedding of `value` for one token, which is never drawn.

    Every request with this token gets NaN from there on; no other request does.
    """
    save_tiny_llama(directory, seed=seed, tie_word_embeddings=False, **overrides)
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][token] = value
    weights["lm_head.weight"][token] = 0.0
    save_file(weights, path, metadata={"format": "pt"})
    return directory
