"""The shipped files: small, bfloat16, loadable as any local model."""

from __future__ import annotations

import json
import struct

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from a2sf import reference

FILES = {
    "__init__.py",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_all_files_are_there() -> None:
    assert {file.name for file in reference.path().iterdir() if file.is_file()} >= FILES


def test_the_weights_are_bfloat16_and_at_most_16_megabytes() -> None:
    weights = reference.path() / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    with weights.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}


def test_the_model_loads_and_completes_from_its_folder_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(reference.path())
    model = AutoModelForCausalLM.from_pretrained(reference.path())
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer) == 4096
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    inputs = tokenizer("One day, a little girl", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id == model.config.bos_token_id
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).startswith("One day")
