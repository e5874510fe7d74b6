"""Bytes and operations of a model and its cache, computed before any allocation.

Owns this arithmetic. The sizes of the weights come from the model's spec. Knows nothing of time,
prices, or how a server is started.
"""

from dataclasses import dataclass
from math import prod

from a2sf.cache.slots import SLOT_OVERHEAD_BYTES
from a2sf.model.spec import ModelSpec
from a2sf.policy import Heads

SCORED_SLOT_BYTES = 12
"""Bytes per slot that a step moves in addition to key and value: it reads position and score, and
writes the score."""


@dataclass(frozen=True)
class Weights:
    """The size of a model's weights in the device's memory."""

    parameters: int
    """Number of parameters; a tensor shared by two layers counts once."""
    nbytes: int
    """Bytes of the loaded parameters and buffers; a shared tensor counts once."""
    step_nbytes: int
    """Bytes that every decode step reads: all but an embedding that is only used for look-up."""
    head_parameters: int
    """Number of parameters of the projection onto the vocabulary."""
    step_parameters: int
    """Number of parameters that every decode step multiplies by."""
    stored_parameters: int | None
    """Number of parameters by the files' headers, without stored buffers; None: no files."""


def weights(spec: ModelSpec) -> Weights:
    """Count a model's weights for the device and dtype of `spec`, without reading them."""
    module = spec.module
    # Both list a shared tensor only once.
    parameters, buffers = list(module.parameters()), list(module.buffers())
    nbytes = sum(tensor.nbytes for tensor in (*parameters, *buffers))
    count = sum(parameter.numel() for parameter in parameters)
    embedding = module.get_input_embeddings().weight
    head = module.get_output_embeddings().weight
    tied = embedding is head
    return Weights(
        parameters=count,
        nbytes=nbytes,
        step_nbytes=nbytes - (0 if tied else embedding.nbytes),
        head_parameters=head.numel(),
        step_parameters=count - (0 if tied else embedding.numel()),
        stored_parameters=_stored_parameters(spec),
    )


def slots_nbytes(spec: ModelSpec, rows: int, slots: Heads) -> int:
    """Bytes of `rows` rows with `slots` [layers][H_kv]: keys, values, positions and scores."""
    slot = 2 * spec.shape.head_dim * spec.dtype.itemsize + SLOT_OVERHEAD_BYTES
    return rows * sum(map(sum, slots)) * slot


def vectors_nbytes(spec: ModelSpec, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens, summed over layers and KV heads."""
    return tokens * 2 * spec.shape.head_dim * spec.dtype.itemsize


def row_step_nbytes(spec: ModelSpec, tokens: int) -> int:
    """Bytes that a decode step moves for a row with `tokens` scored tokens, summed over heads."""
    return vectors_nbytes(spec, tokens) + tokens * SCORED_SLOT_BYTES


def logits_nbytes(spec: ModelSpec, rows: int) -> int:
    """Bytes of a step's logits: once in the model's dtype, and once in float32 for sampling."""
    return rows * spec.shape.vocab_size * (spec.dtype.itemsize + 4)


def attention_operations(spec: ModelSpec, tokens: int) -> int:
    """Multiplications and additions of a query over `tokens`, summed over layers and KV heads.

    For each token, every query head of the group takes one product with the key and one with the
    value: head_dim multiplications and head_dim additions each.
    """
    return 4 * spec.shape.head_dim * _group(spec) * tokens


def scoring_operations(spec: ModelSpec, tokens: int) -> tuple[int, int]:
    """Multiplications and additions that scoring adds to a step over `tokens`, summed over heads.

    A KV head multiplies a token's score by alpha once, and adds one attention weight per query
    head.
    """
    return tokens, _group(spec) * tokens


def prompt_operations(spec: ModelSpec, weights: Weights, tokens: int) -> int:
    """Multiplications and additions of an exact prefill.

    Only the last token is projected onto the vocabulary. Attention is causal: on average, a query
    attends to half of the prompt.
    """
    layers = 2 * (weights.step_parameters - weights.head_parameters) * tokens
    heads = spec.shape.num_layers * spec.shape.num_kv_heads
    pairs = heads * tokens * (tokens + 1) // 2
    return layers + attention_operations(spec, pairs) + 2 * weights.head_parameters


def _group(spec: ModelSpec) -> int:
    """Query heads that share a KV head."""
    return spec.shape.num_attention_heads // spec.shape.num_kv_heads


def _stored_parameters(spec: ModelSpec) -> int | None:
    if spec.gguf is not None:
        return spec.gguf.parameters
    if spec.stored is None:
        return None
    kept = spec.module.state_dict().keys()
    buffers = sum(b.numel() for name, b in spec.module.named_buffers() if name in kept)
    return sum(prod(tensor.shape) for tensor in spec.stored.values()) - int(buffers)
