"""The model before training: a transformers Llama whose first layer can look back from the start.

Owns the initialisation. Left to itself a model of this size spends millions of tokens before heads
that attend to the previous token appear, and until then it answers by picking some value of the
context (see ``training/README.md``). So four heads of layer 0 begin as such heads.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training.config import Shape

BOS_ID = 0
EOS_ID = 1

# How far each of the first query heads of layer 0 looks back, in tokens.
LOOK_BACK = (1, 2, 1, 3)
# The constant that every embedding carries in its first component, so that queries and keys can
# have a part that does not depend on the token; the other components have a deviation of 0.02.
CONSTANT = 0.1
# Only the fastest rotations tell neighbours apart.
ROTATIONS = 5
STRENGTH = 1.25


def build_model(shape: Shape) -> LlamaForCausalLM:
    """A freshly initialised float32 model; seed torch before."""
    config = LlamaConfig(
        **dataclasses.asdict(shape),
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Make the first heads of layer 0 attend ``LOOK_BACK`` tokens back.

    A key is (1, 0) in each rotated pair; a query is turned back by its distance, so that the score
    ``sum cos(f_i (distance - offset))`` over the fastest rotations peaks at the offset.
    """
    model.model.embed_tokens.weight[:, 0] = CONSTANT
    attention = model.model.layers[0].self_attn
    head_dim, group = attention.head_dim, attention.num_key_value_groups
    frequencies = model.model.rotary_emb.inv_freq[:ROTATIONS]
    half, turned = head_dim // 2, len(frequencies)
    for head, offset in enumerate(LOOK_BACK[: model.config.num_attention_heads]):
        query = head * head_dim
        attention.q_proj.weight[query : query + turned, 0] = STRENGTH * torch.cos(
            offset * frequencies
        )
        attention.q_proj.weight[query + half : query + half + turned, 0] = -STRENGTH * torch.sin(
            offset * frequencies
        )
        key = head // group * head_dim
        attention.k_proj.weight[key : key + turned, 0] = STRENGTH
