"""What a model and its cache take, before anything is allocated: bytes, and operations of a step.

Owns the arithmetic; the weights' bytes are read off a model's outline. Knows nothing of time, of
prices, or of how a server is started.
"""

from dataclasses import dataclass
from math import prod

from a2sf import linear
from a2sf.cache import SLOT_OVERHEAD_BYTES
from a2sf.outline import Outline
from a2sf.policy import Heads

SCORED_SLOT_BYTES = 12
"""Bytes that a step moves of a slot beside its key and value: the position and the score are read,
the score is written again."""


@dataclass(frozen=True)
class Weights:
    """A model's weights as they lie in the device's memory."""

    parameters: int
    """How many numbers; what is shared by two layers counts once."""
    nbytes: int
    """Bytes of the loaded model's tensors, parameters and buffers. On a processor a head that is
    shared with the embedding is laid out a second time and counts twice."""
    step_nbytes: int
    """Bytes of those that every decode step reads: all but an embedding that is only looked up."""
    head_parameters: int
    """How many of the parameters project onto the vocabulary."""
    step_parameters: int
    """How many parameters every decode step multiplies by."""
    stored_parameters: int | None
    """How many the headers of the files tell, buffers that are stored there left out; None: the
    files are not there."""


def weights(outline: Outline) -> Weights:
    """Count a model's weights on the device and in the dtype of `outline`, without reading any."""
    module = outline.module
    # Both list a tensor that is held in two places once.
    parameters, buffers = list(module.parameters()), list(module.buffers())
    nbytes = sum(tensor.nbytes for tensor in (*parameters, *buffers))
    count = sum(parameter.numel() for parameter in parameters)
    embedding = module.get_input_embeddings().weight
    head = module.get_output_embeddings().weight
    looked_up = embedding is not head
    if not looked_up and _packs(outline):
        nbytes, looked_up = nbytes + head.nbytes, True
    tied = embedding is head
    return Weights(
        parameters=count,
        nbytes=nbytes,
        step_nbytes=nbytes - (embedding.nbytes if looked_up else 0),
        head_parameters=head.numel(),
        step_parameters=count - (0 if tied else embedding.numel()),
        stored_parameters=_stored_parameters(outline),
    )


def slots_nbytes(outline: Outline, rows: int, slots: Heads) -> int:
    """Bytes of `rows` rows with `slots` [layers][H_kv]: keys, values, positions and scores."""
    slot = 2 * outline.shape.head_dim * outline.dtype.itemsize + SLOT_OVERHEAD_BYTES
    return rows * sum(map(sum, slots)) * slot


def vectors_nbytes(outline: Outline, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens, summed over layers and KV heads."""
    return tokens * 2 * outline.shape.head_dim * outline.dtype.itemsize


def held_nbytes(outline: Outline, tokens: int) -> int:
    """Bytes that a decode step must move of a row that holds `tokens` scored ones, over heads."""
    return vectors_nbytes(outline, tokens) + tokens * SCORED_SLOT_BYTES


def logits_nbytes(outline: Outline, rows: int) -> int:
    """Bytes of a step's logits: as the model makes them, and in float32 as tokens are drawn."""
    return rows * outline.shape.vocab_size * (outline.dtype.itemsize + 4)


def attention_operations(outline: Outline, tokens: int) -> int:
    """Multiplications and additions of a query over `tokens`, summed over layers and KV heads.

    Each token costs every query head of its group a product with its key and one with its value,
    head_dim multiplications and as many additions each.
    """
    return 4 * outline.shape.head_dim * _group(outline) * tokens


def scoring_operations(outline: Outline, tokens: int) -> tuple[int, int]:
    """Multiplications and additions that scoring adds to a step over `tokens`, summed over heads.

    A KV head multiplies a token's score by alpha once, and adds what each of its query heads pays.
    """
    return tokens, _group(outline) * tokens


def prompt_operations(outline: Outline, weights: Weights, tokens: int) -> int:
    """Multiplications and additions of reading a prompt exactly; its last token alone is projected.

    Causal attention: a query sees half of the prompt, on average.
    """
    layers = 2 * (weights.step_parameters - weights.head_parameters) * tokens
    heads = outline.shape.num_layers * outline.shape.num_kv_heads
    seen = heads * tokens * (tokens + 1) // 2
    return layers + attention_operations(outline, seen) + 2 * weights.head_parameters


def _group(outline: Outline) -> int:
    """Query heads that share a KV head."""
    return outline.shape.num_attention_heads // outline.shape.num_kv_heads


def _packs(outline: Outline) -> bool:
    """Whether `linear.pack` would lay linear layers out anew."""
    return outline.device_type == "cpu" and linear.packs(outline.dtype)


def _stored_parameters(outline: Outline) -> int | None:
    if outline.gguf is not None:
        return outline.gguf.parameters
    if outline.stored is None:
        return None
    kept = outline.module.state_dict().keys()
    buffers = sum(b.numel() for name, b in outline.module.named_buffers() if name in kept)
    return sum(prod(tensor.shape) for tensor in outline.stored.values()) - int(buffers)
