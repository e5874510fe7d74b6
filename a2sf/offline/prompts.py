"""Prompts of given texts, computed once for all policies with an exact prefill.

In an exact prefill a prompt is one block, so nothing is evicted before its end: its queries, keys
and values in every layer are the same under all these policies. Owns these cached tensors, and the
forward pass of only the tokens after the prompts. Knows nothing of policies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from a2sf.cache.attention import attend_causally
from a2sf.model.layer_attention import LayerAttention
from a2sf.model.loader import LoadedModel
from a2sf.model.spec import ModelShape


@dataclass(frozen=True)
class Prompt:
    """The computed tensors of one prompt."""

    projected: tuple[tuple[Tensor, Tensor, Tensor], ...]
    """By layer: queries [H_q, tokens, D], keys and values [H_kv, tokens, D]; rotated."""
    hidden: Tensor
    """[tokens, hidden], the final hidden states, for `logits`."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.hidden)


def nbytes(shape: ModelShape, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of `Prompt.projected` for prompts of `tokens` tokens in total."""
    heads = shape.num_attention_heads + 2 * shape.num_kv_heads
    return tokens * shape.num_layers * heads * shape.head_dim * dtype.itemsize


def read(model: LoadedModel, texts: Sequence[Sequence[int]], *, batch: int) -> list[Prompt]:
    """Compute prompts of at least one token each, up to `batch` in one forward pass."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Prompt] = {}
    for first in range(0, len(order), batch):
        members = order[first : first + batch]
        width = max(len(texts[i]) for i in members)
        # Pad with the row's last token: for another token the model might return NaN.
        rows = [[*texts[i], *[texts[i][-1]] * (width - len(texts[i]))] for i in members]
        ids = torch.tensor(rows, device=model.device)
        positions = torch.arange(width, device=model.device).expand(len(members), -1)
        noting = _Noting([len(texts[i]) for i in members])
        hidden = model.hidden_states(ids, positions, noting)
        for row, index in enumerate(members):
            kept = hidden[row, : len(texts[index])].clone()
            found[index] = Prompt(tuple(noting.layers[row]), kept)
    return [found[index] for index in range(len(texts))]


class _Noting:
    """Causal attention that records the queries, keys and values of each row and layer."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.layers: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in lengths]
        self._lengths = lengths

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        for row, length in enumerate(self._lengths):
            q, k, v = (t[row, :, :length].clone() for t in (query, keys, values))
            self.layers[row].append((q, k, v))
        # Padding is at the right, where no real token attends to it.
        return attend_causally(query, keys, values, scale)


class AfterPrompts:
    """Wraps an attention over whole texts, for a forward pass of only the tokens after prompts."""

    def __init__(
        self, attention: LayerAttention, prompts: Sequence[Prompt], lengths: Sequence[int]
    ) -> None:
        """`attention` runs over rows that start with `prompts` and have `lengths` tokens."""
        self._attention = attention
        self._rows = [(one, length) for one, length in zip(prompts, lengths, strict=True)]
        self._width = max(lengths)

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Attend from the tokens after the prompts, [rows, H, width, D]; padded at the right.

        Padding is 0 in the input of the wrapped attention and in the result.
        """
        whole = [self._empty(tensor, self._width) for tensor in (query, keys, values)]
        for row, (prompt, length) in enumerate(self._rows):
            end = prompt.tokens
            for tensor, known, new in zip(
                whole, prompt.projected[layer], (query, keys, values), strict=True
            ):
                tensor[row, :, :end] = known
                tensor[row, :, end:length] = new[row, :, : length - end]
        q, k, v = whole
        found = self._attention(layer, q, k, v, scale)
        output = self._empty(query, query.shape[2])
        for row, (prompt, length) in enumerate(self._rows):
            after = length - prompt.tokens
            output[row, :, :after] = found[row, :, prompt.tokens : length]
        return output

    @staticmethod
    def _empty(like: Tensor, width: int) -> Tensor:
        """Zeros [rows, heads, width, D], with the memory layout of a model's projections."""
        rows, heads, _, dim = like.shape
        return like.new_zeros(rows, width, heads, dim).transpose(1, 2)
