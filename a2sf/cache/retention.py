"""Records which tokens each query could attend to along given texts.

Owns two recorders of a layer's scan: one for the retained tokens of each query, and one for their
share of the full attention row. Knows nothing of models or of texts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from a2sf.cache.slots import Slots


class RetentionRecorder:
    """Records which tokens each query of a layer could attend to."""

    def __init__(self) -> None:
        self._retained = torch.empty(0)

    def begin(self, keys: Tensor) -> None:
        """Start a layer with keys [rows, H_kv, width, D]."""
        rows, kv_heads, width, _ = keys.shape
        # The last row collects the queries of padding, the last column the empty slots.
        shape = (rows, kv_heads, width + 1, width + 1)
        self._retained = torch.zeros(shape, dtype=torch.bool, device=keys.device)

    @property
    def table(self) -> Tensor:
        """The record: [rows, H_kv, width + 1, width + 1] bool, contiguous.

        Element [.., i, p] is true if query i could attend to the token at position p.
        """
        return self._retained

    def block(self, first: int, tokens: int, slots: Slots) -> None:
        """Record the stored tokens for the queries first .. first + tokens - 1 of every row."""
        self._retained[:, :, first : first + tokens] = self._stored(slots)[:, :, None]

    def step(self, at: Tensor, slots: Slots) -> None:
        """Record the stored tokens for one query per row, at position `at` [rows]."""
        rows = torch.arange(len(at), device=at.device)
        query = at.clamp(max=self._retained.shape[2] - 1)
        self._retained[rows, :, query] = self._stored(slots)

    def _stored(self, slots: Slots) -> Tensor:
        width = self._retained.shape[-1]
        stored = torch.zeros_like(self._retained[:, :, 0])
        for run, part in slots.parts:
            there = part.position[0].clamp(max=width - 1).long()
            stored[:, run.heads].scatter_(2, there, True)
        return stored

    def end(self, query: Tensor, keys: Tensor, scale: float) -> None:
        """End a layer with query [rows, H_q, width, D] and keys [rows, H_kv, width, D]."""


class Similarity(RetentionRecorder):
    """Compares each counted query's attention row over the retained tokens with its full row."""

    def __init__(self, counted: Sequence[Sequence[int]]) -> None:
        """`counted` are the positions of the queries to compare, for each row."""
        super().__init__()
        self._counted = [list(positions) for positions in counted]
        self._layers: list[list[Tensor]] = []

    def end(self, query: Tensor, keys: Tensor, scale: float) -> None:
        """Compare a layer's rows: query [rows, H_q, width, D], keys [rows, H_kv, width, D]."""
        kv_heads, width = keys.shape[1:3]
        group = query.shape[1] // kv_heads
        means = []
        for row, counted in enumerate(self._counted):
            at = torch.tensor(counted, device=keys.device)
            q = query[row][:, at].float().view(kv_heads, group, len(counted), -1)
            logits = q @ keys[row][:, None].float().transpose(-1, -2) * scale
            unseen = torch.arange(width, device=keys.device) > at[:, None]
            squares = logits.masked_fill(unseen, -torch.inf).softmax(dim=-1).square()
            kept = self._retained[row][:, at, :width]
            # Renormalising the retained part does not change its direction, nor the cosine.
            cosine = ((squares * kept[:, None]).sum(dim=-1) / squares.sum(dim=-1)).sqrt()
            means.append(cosine.mean(dim=(1, 2)))
        self._layers.append(means)

    def of(self, row: int) -> Tensor:
        """The mean cosines of one example, [layers, H_kv]."""
        return torch.stack([layer[row] for layer in self._layers]).cpu()
