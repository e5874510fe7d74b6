"""The attention function that transformers calls in every layer of our models.

Owns `LayerAttention`, the protocol that replaces a layer's attention, the function registered for
it, and its restriction to some heads. The caller passes a `LayerAttention` to every forward pass;
transformers hands it to each layer as a keyword argument. So nothing is patched and modules hold no
state. Knows nothing of loading, of requests, or of a particular family.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from a2sf.model import families

ATTENTION_NAME = "a2sf"
"""The name under which transformers knows our attention function."""


class LayerAttention(Protocol):
    """Replaces the attention of every layer in a forward pass."""

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, /
    ) -> Tensor:
        """Attend in one layer.

        Args:
            layer: the layer's index.
            query: [rows, H_q, width, D], rotated.
            keys, values: [rows, H_kv, width, D], the keys rotated.
            scale: factor on the logits.

        Returns:
            The attention output, [rows, H_q, width, D].
        """
        ...


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layer_attention: LayerAttention,
    **arguments: Any,
) -> tuple[Tensor, None]:
    assert attention_mask is None, "masks come from positions; transformers makes none for us"
    layer_index = module.layer_idx
    assert isinstance(layer_index, int)
    families.refuse_effects(layer_index, module.config, arguments)
    output = layer_attention(layer_index, query, key, value, scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)


def for_local_heads(attention: LayerAttention, local_heads: tuple[int, int]) -> LayerAttention:
    """Restrict `attention` to the KV heads `local_heads` (first, end), and to their query heads.

    In some transformers plans every process computes all heads but projects only its own heads'
    output. The output of the other heads is 0 and is never read.
    """

    def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, /) -> Tensor:
        first, end = local_heads
        if keys.shape[1] == end - first:
            return attention(layer, query, keys, values, scale)
        group = query.shape[1] // keys.shape[1]
        own = slice(first * group, end * group)
        output = torch.zeros_like(query)
        output[:, own] = attention(
            layer, query[:, own], keys[:, first:end], values[:, first:end], scale
        )
        return output

    return attend
