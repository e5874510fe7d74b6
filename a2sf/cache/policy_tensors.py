"""The policies of a batch's rows, as tensors on the cache's device.

Owns `PolicyTensors`: it stacks one `EffectivePolicy` per row, and selects layers, heads and rows.
Knows nothing of keys, values or scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from a2sf.cache import scoring
from a2sf.cache.layout import Run
from a2sf.policy import EffectivePolicy


@dataclass(frozen=True)
class PolicyTensors:
    """The policies of a batch's rows in some layers, on the cache's device."""

    first_heads: Tensor
    """[layers] int64, the number of each layer's first head, from `scoring.first_heads`."""
    alpha: Tensor
    """[layers, rows, H_kv] float64, so that powers of alpha agree on all devices."""
    budget: Tensor
    """[layers, rows, H_kv] int64, slots."""
    recent: Tensor
    """[layers, rows, H_kv] int64, tokens."""
    sinks: Tensor
    """[rows] int64, tokens."""
    random_seed: Tensor
    """[rows] int64; -1 for rows that accumulate attention."""
    scored: Tensor
    """[rows] bool: whether a row's evictions depend on its attention."""
    any_random: bool
    """Whether any row has a random_seed; known without a device sync."""
    any_scored: bool
    """Whether any row's evictions depend on its attention; known without a device sync."""

    @classmethod
    def stack(
        cls,
        policies: Sequence[EffectivePolicy],
        lengths: Sequence[int],
        device: torch.device,
        heads: slice = slice(None),
    ) -> Self:
        """Stack one policy per row.

        Args:
            policies: one per row.
            lengths: the most tokens of each row's sequence. A row with room for all of them never
                evicts, so its scores are not computed.
            device: where the tensors are.
            heads: the KV heads of this process; by default, all heads.
        """

        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def of_heads(values: Sequence[Sequence[Sequence[float]]], dtype: torch.dtype) -> Tensor:
            every = torch.tensor(values, dtype=dtype, device=device)
            return every[:, :, heads].transpose(0, 1).contiguous()

        layers = torch.arange(len(policies[0].alpha), device=device)
        scored = [
            p.scored and min(map(min, p.head_budgets)) < length
            for p, length in zip(policies, lengths, strict=True)
        ]
        return cls(
            first_heads=scoring.first_heads(layers, heads.start or 0),
            alpha=of_heads([p.alpha for p in policies], torch.float64),
            budget=of_heads([p.head_budgets for p in policies], torch.int64),
            recent=of_heads([p.head_recents for p in policies], torch.int64),
            sinks=integers([p.sinks for p in policies]),
            random_seed=integers(
                [-1 if p.random_seed is None else p.random_seed for p in policies]
            ),
            scored=torch.tensor(scored, device=device),
            any_random=any(p.random_seed is not None for p in policies),
            any_scored=any(scored),
        )

    @classmethod
    def idle(cls, layers: int, rows: int, num_kv_heads: int, device: torch.device) -> Self:
        """Allocate policies for rows without a sequence: each keeps one token and has no scores."""

        def integers(*shape: int, value: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        return cls(
            first_heads=scoring.first_heads(torch.arange(layers, device=device)),
            alpha=torch.ones(layers, rows, num_kv_heads, dtype=torch.float64, device=device),
            budget=integers(layers, rows, num_kv_heads, value=1),
            recent=integers(layers, rows, num_kv_heads, value=0),
            sinks=integers(rows, value=0),
            random_seed=integers(rows, value=-1),
            scored=torch.zeros(rows, dtype=torch.bool, device=device),
            any_random=False,
            any_scored=False,
        )

    def copy_row(self, row: int, source: Self, source_row: int) -> None:
        """Copy the policy of `source_row` to `row`; `any_random` and `any_scored` do not change."""
        for name in ("alpha", "budget", "recent"):
            getattr(self, name)[:, row] = getattr(source, name)[:, source_row]
        for name in ("sinks", "random_seed", "scored"):
            getattr(self, name)[row] = getattr(source, name)[source_row]
        self.first_heads.copy_(source.first_heads)

    def part(self, run: Run) -> Self:
        """Return the policies of a run's layers and heads."""
        layers, _, heads = self.budget.shape
        if run.shape[:2] == (layers, heads):
            return self
        where = (run.layers, slice(None), run.heads)
        return replace(
            self,
            first_heads=self.first_heads[run.layers] + run.heads.start,
            alpha=self.alpha[where],
            budget=self.budget[where],
            recent=self.recent[where],
        )

    @property
    def accumulating(self) -> Tensor:
        """[rows, 1, 1] bool: whether a row's scores accumulate attention."""
        return (self.random_seed < 0)[:, None, None]

    def rows(self, rows: slice) -> Self:
        """Return a view of some rows."""
        return replace(
            self,
            alpha=self.alpha[:, rows],
            budget=self.budget[:, rows],
            recent=self.recent[:, rows],
            sinks=self.sinks[rows],
            random_seed=self.random_seed[rows],
            scored=self.scored[rows],
        )

    def layer(self, index: int) -> Self:
        """Return the policies of one layer; the layer dimension stays, with size 1."""
        one = slice(index, index + 1)
        return replace(
            self,
            first_heads=self.first_heads[one],
            alpha=self.alpha[one],
            budget=self.budget[one],
            recent=self.recent[one],
        )
