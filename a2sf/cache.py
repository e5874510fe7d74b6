"""The slot cache: rectangles of slots, one a row and KV head, and how tokens enter and leave them.

Owns the tensors and the moves on them: write, trim, copy a row. A slot holds a key
(rotated for its own position), a value, the token's position and its score; which tokens to keep
is decided by `scoring`. Slot order means nothing, and the count of slots in use is never a
position. Knows nothing of queries, models or requests.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from a2sf import scoring
from a2sf.policy import EffectivePolicy
from a2sf.scoring import EMPTY


@dataclass(frozen=True)
class PolicyTensors:
    """The policies of a batch's rows, one entry a row, on the cache's device."""

    alpha: Tensor
    """[rows, layers, H_kv] float64; double, so that powers of it agree wherever they are taken."""
    budget: Tensor
    """[rows] int64, slots."""
    recent: Tensor
    """[rows] int64, tokens."""
    sinks: Tensor
    """[rows] int64, tokens."""
    random_seed: Tensor
    """[rows] int64; -1 where scores are accumulated."""
    any_random: bool
    """Whether any row has a random_seed; known without asking the device."""

    @classmethod
    def stack(cls, policies: list[EffectivePolicy], device: torch.device) -> Self:
        """Put the policies of the rows side by side."""

        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            alpha=torch.tensor([p.alpha for p in policies], dtype=torch.float64, device=device),
            budget=integers([p.budget for p in policies]),
            recent=integers([p.recent for p in policies]),
            sinks=integers([p.sinks for p in policies]),
            random_seed=integers(
                [-1 if p.random_seed is None else p.random_seed for p in policies]
            ),
            any_random=any(p.random_seed is not None for p in policies),
        )


@dataclass(frozen=True)
class LayerSlots:
    """One layer's slots. All heads of a row fill in lockstep: its slots [0, used) hold tokens."""

    keys: Tensor
    """[rows, H_kv, slots, D] in the model's dtype."""
    values: Tensor
    """[rows, H_kv, slots, D] in the model's dtype."""
    position: Tensor
    """[rows, H_kv, slots] int32, `EMPTY` where no token is."""
    score: Tensor
    """[rows, H_kv, slots] float32."""

    @classmethod
    def empty(
        cls,
        rows: int,
        num_kv_heads: int,
        slots: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Allocate slots that hold nothing. Zeros, so that no stale NaN is ever read."""
        shape = (rows, num_kv_heads, slots)
        return cls(
            keys=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            values=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            position=torch.full(shape, EMPTY, dtype=torch.int32, device=device),
            score=torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def view(self, rows: slice, slots: int) -> Self:
        """Return a window of the same memory: some rows, the first `slots` slots."""
        return type(self)(
            self.keys[rows, :, :slots],
            self.values[rows, :, :slots],
            self.position[rows, :, :slots],
            self.score[rows, :, :slots],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of these slots, read off the tensors."""
        return sum(t.nbytes for t in (self.keys, self.values, self.position, self.score))

    def write(self, slot: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
        """Put tokens into slots, with score 0, over whatever was there.

        Args:
            slot: [rows, H_kv, width] int64, where each head puts each token.
            keys, values: [rows, H_kv, width, D].
            position: [rows, width] integer; `EMPTY` marks padding, which leaves its slot empty.
        """
        wide = slot[..., None].expand_as(keys)
        self.keys.scatter_(2, wide, keys)
        self.values.scatter_(2, wide, values)
        self.position.scatter_(2, slot, position.to(torch.int32)[:, None].expand_as(slot))
        self.score.scatter_(2, slot, 0.0)

    def victim(self, start: Tensor, sinks: Tensor, recent: Tensor) -> Tensor:
        """Find each head's slot to evict before a token is placed at `start`: [rows, H_kv] int64.

        Only rows that hold more than sinks + recent tokens have one; others get any slot.
        """
        allowed = scoring.evictable(self.position, start, sinks, recent)
        return scoring.eviction_key(self.score, self.position, allowed).argmin(dim=-1)

    def trim(self, excess: Tensor, start: Tensor, sinks: Tensor, recent: Tensor) -> None:
        """Evict each head's `excess` lowest tokens and close the gaps, in slot order.

        Args:
            excess: [rows] int64, how many to evict; a row must hold that many evictable tokens.
            start, sinks, recent: [rows], as in `scoring.evictable`.
        """
        if not bool((excess > 0).any()):
            return
        allowed = scoring.evictable(self.position, start, sinks, recent)
        key = scoring.eviction_key(self.score, self.position, allowed)
        rank = key.argsort(dim=-1).argsort(dim=-1)
        gone = rank < excess[:, None, None]
        order = gone.to(torch.int8).argsort(dim=-1, stable=True)
        wide = order[..., None].expand_as(self.keys)
        self.keys.copy_(self.keys.gather(2, wide))
        self.values.copy_(self.values.gather(2, wide))
        self.score.copy_(self.score.gather(2, order))
        kept = self.position.masked_fill(gone, EMPTY)
        self.position.copy_(kept.gather(2, order))


class SlotCache:
    """Slots for every layer, allocated once; rows are handed out by whoever owns the cache."""

    def __init__(
        self,
        *,
        num_layers: int,
        rows: int,
        num_kv_heads: int,
        slots: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rows = rows
        self.slots = slots
        self.layers = [
            LayerSlots.empty(rows, num_kv_heads, slots, head_dim, dtype, device)
            for _ in range(num_layers)
        ]
        self.used = torch.zeros(rows, dtype=torch.int64, device=device)
        """[rows] int64: how many slots of each row hold tokens, the same for every head."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, read off the tensors."""
        return sum(layer.nbytes for layer in self.layers)

    def row_nbytes(self, slots: int) -> int:
        """Bytes of one row's first `slots` slots over all layers, read off the tensors."""
        return sum(layer.view(slice(0, 1), slots).nbytes for layer in self.layers)

    def clear(self, row: int) -> None:
        """Forget a row's tokens."""
        self.used[row] = 0
        for layer in self.layers:
            layer.position[row].fill_(EMPTY)

    def copy_row(self, target: int, source: "SlotCache", row: int, slots: int) -> None:
        """Make row `target` hold what the first `slots` slots of `source`'s `row` hold."""
        self.clear(target)
        self.used[target] = source.used[row]
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            for name in ("keys", "values", "position", "score"):
                getattr(mine, name)[target, :, :slots] = getattr(theirs, name)[row, :, :slots]
