"""Random models of real shapes, made on the device without files.

Owns the shapes, and makes a model that both this engine and transformers run with the same weights.
Knows nothing of what is measured.
"""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from a2sf.model.layer_attention import ATTENTION_NAME
from a2sf.model.loader import LoadedModel
from a2sf.model.spec import ModelShape
from a2sf.schema import ModelIdentity
from tests.tiny import byte_tokenizer


@dataclass(frozen=True)
class LlamaShape:
    """The settings of a Llama, by transformers' names."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131_072

    def config(self) -> LlamaConfig:
        """Return transformers' configuration, with the rotary embedding of Llama 3."""
        return LlamaConfig(
            **asdict(self),
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
        )


SHAPES = {
    "8b": LlamaShape(32, 4096, 14336, 32, 8, 128, 128_256),
    "1b": LlamaShape(16, 2048, 8192, 32, 8, 64, 128_256, tie_word_embeddings=True),
}

DRY_SHAPES = {
    "8b": LlamaShape(2, 32, 48, 4, 2, 8, 300, max_position_embeddings=512),
    "1b": LlamaShape(2, 32, 48, 4, 2, 8, 300, tie_word_embeddings=True),
}

CHECKED = LlamaShape(3, 128, 256, 8, 2, 64, 258, tie_word_embeddings=True)
"""Small, with heads of a size that the kernels are compiled for anyway."""


def build(
    shape: LlamaShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    deviation: float = 0.02,
    seed: int = 0,
) -> LoadedModel:
    """Make a random model on the device, in the dtype; `deviation` is the spread of its weights."""
    config = shape.config()
    config.initializer_range = deviation
    torch.manual_seed(seed)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    sizes = ModelShape(
        num_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_context=shape.max_position_embeddings,
    )
    return LoadedModel(
        identity=ModelIdentity(
            id="random",
            revision=None,
            architecture="LlamaForCausalLM",
            num_layers=sizes.num_layers,
            num_attention_heads=sizes.num_attention_heads,
            num_kv_heads=sizes.num_kv_heads,
            fingerprint="0" * 64,
        ),
        shape=sizes,
        module=module.eval().requires_grad_(False),
        tokenizer=byte_tokenizer(),
        device=device,
        dtype=dtype,
        eos_token_ids=frozenset(),
    )


def plain(model: LoadedModel) -> Any:
    """A second module on the same weights, with transformers' own attention."""
    shared = (*model.module.parameters(), *model.module.buffers())
    module = copy.deepcopy(model.module, {id(tensor): tensor for tensor in shared})
    module.set_attn_implementation("sdpa")
    return module


def weight_bytes(model: LoadedModel) -> int:
    """Bytes of the weights that a decode step reads.

    These are all weights except an untied input embedding, because only some rows of that are read.
    """
    embedding: torch.Tensor = model.module.get_input_embeddings().weight
    tied = model.module.get_output_embeddings().weight is embedding
    every: int = sum(p.nbytes for p in model.module.parameters())
    return every if tied else every - embedding.nbytes


def token_bytes(model: LoadedModel) -> int:
    """Bytes of a token's keys and values in all layers."""
    shape = model.shape
    heads = shape.num_layers * shape.num_kv_heads
    return heads * 2 * shape.head_dim * model.dtype.itemsize
