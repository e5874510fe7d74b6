"""What eviction has left of each attention row along given texts.

Owns two watchers of a walk over a layer's rows: which tokens each query could see, and how much of
its full row those make up. Knows nothing of models or of texts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from a2sf.cache import Slots


class Kept:
    """Which tokens each query of a layer could see."""

    def __init__(self) -> None:
        self._kept = torch.empty(0)

    def begin(self, keys: Tensor) -> None:
        """Begin a layer of keys [rows, H_kv, width, D]."""
        rows, kv_heads, width, _ = keys.shape
        # One more place each way takes what lies beyond: padding's queries, empty slots.
        shape = (rows, kv_heads, width + 1, width + 1)
        self._kept = torch.zeros(shape, dtype=torch.bool, device=keys.device)

    @property
    def table(self) -> Tensor:
        """Where it is noted: [rows, H_kv, width + 1, width + 1] bool, contiguous.

        Place [.., i, position] is true where query i was given the token of that position.
        """
        return self._kept

    def block(self, first: int, tokens: int, slots: Slots) -> None:
        """Note what the queries at first .. first + tokens - 1 of every row were given."""
        self._kept[:, :, first : first + tokens] = self._stored(slots)[:, :, None]

    def step(self, at: Tensor, slots: Slots) -> None:
        """Note what the one query of each row, at position `at` [rows], was given."""
        rows = torch.arange(len(at), device=at.device)
        query = at.clamp(max=self._kept.shape[2] - 1)
        self._kept[rows, :, query] = self._stored(slots)

    def _stored(self, slots: Slots) -> Tensor:
        width = self._kept.shape[-1]
        stored = torch.zeros_like(self._kept[:, :, 0])
        for run, part in slots.parts:
            there = part.position[0].clamp(max=width - 1).long()
            stored[:, run.heads].scatter_(2, there, True)
        return stored

    def end(self, query: Tensor, keys: Tensor, scale: float) -> None:
        """End a layer of query [rows, H_q, width, D] and keys [rows, H_kv, width, D]."""


class Similarity(Kept):
    """How much of each counted query's full row the tokens that it could see make up."""

    def __init__(self, counted: Sequence[Sequence[int]]) -> None:
        """`counted` are the positions of each row whose queries count."""
        super().__init__()
        self._counted = [list(positions) for positions in counted]
        self._layers: list[list[Tensor]] = []

    def end(self, query: Tensor, keys: Tensor, scale: float) -> None:
        """Compare the rows of a layer: query [rows, H_q, width, D], keys [rows, H_kv, width, D]."""
        kv_heads, width = keys.shape[1:3]
        group = query.shape[1] // kv_heads
        means = []
        for row, counted in enumerate(self._counted):
            at = torch.tensor(counted, device=keys.device)
            q = query[row][:, at].float().view(kv_heads, group, len(counted), -1)
            logits = q @ keys[row][:, None].float().transpose(-1, -2) * scale
            unseen = torch.arange(width, device=keys.device) > at[:, None]
            squares = logits.masked_fill(unseen, -torch.inf).softmax(dim=-1).square()
            kept = self._kept[row][:, at, :width]
            # The kept part of a row points where the renormalised row does: cosines are the same.
            cosine = ((squares * kept[:, None]).sum(dim=-1) / squares.sum(dim=-1)).sqrt()
            means.append(cosine.mean(dim=(1, 2)))
        self._layers.append(means)

    def of(self, row: int) -> Tensor:
        """The figures of one example, [layers, H_kv]."""
        return torch.stack([layer[row] for layer in self._layers]).cpu()
