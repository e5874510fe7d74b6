"""The slot cache: rectangles of slots, one a layer, row and KV head, and how tokens come and go.

Owns the tensors and the moves on them: place, write, evict, copy a row. A slot holds a key
(rotated for its own position), a value, the token's position and its score; which tokens to keep
is decided by `scoring`. Slot order means nothing: a slot is empty when its position says so. Knows
nothing of queries, models or requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from a2sf import scoring
from a2sf.policy import EffectivePolicy
from a2sf.scoring import EMPTY


@dataclass(frozen=True)
class PolicyTensors:
    """The policies of a batch's rows in some layers, on the cache's device."""

    layers: Tensor
    """[layers] int64, which layers of the model these are."""
    alpha: Tensor
    """[layers, rows, H_kv] float64; double, so that powers of it agree wherever they are taken."""
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
    any_scored: bool
    """Whether any row's evictions hang on its attention; known without asking the device."""

    @classmethod
    def stack(
        cls, policies: Sequence[EffectivePolicy], lengths: Sequence[int], device: torch.device
    ) -> Self:
        """Put the policies of the rows side by side.

        `lengths` are the tokens that each row's sequence may reach: a row with room for all of
        them evicts nothing, so nobody asks for its scores.
        """

        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        alpha = torch.tensor([p.alpha for p in policies], dtype=torch.float64, device=device)
        return cls(
            layers=torch.arange(alpha.shape[1], device=device),
            alpha=alpha.transpose(0, 1).contiguous(),
            budget=integers([p.budget for p in policies]),
            recent=integers([p.recent for p in policies]),
            sinks=integers([p.sinks for p in policies]),
            random_seed=integers(
                [-1 if p.random_seed is None else p.random_seed for p in policies]
            ),
            any_random=any(p.random_seed is not None for p in policies),
            any_scored=any(
                p.scored and p.budget < length for p, length in zip(policies, lengths, strict=True)
            ),
        )

    @property
    def accumulating(self) -> Tensor:
        """[rows, 1, 1] bool: whether a row's scores grow with what its queries pay."""
        return (self.random_seed < 0)[:, None, None]

    def layer(self, index: int) -> Self:
        """Return what concerns one layer, as a stack of one."""
        one = slice(index, index + 1)
        return replace(self, layers=self.layers[one], alpha=self.alpha[one])


@dataclass(frozen=True)
class Slots:
    """Slots of some rows in some layers. All heads of a row fill in lockstep."""

    keys: Tensor
    """[layers, rows, H_kv, slots, D] in the model's dtype."""
    values: Tensor
    """[layers, rows, H_kv, slots, D] in the model's dtype."""
    position: Tensor
    """[layers, rows, H_kv, slots] int32, `EMPTY` where no token is."""
    score: Tensor
    """[layers, rows, H_kv, slots] float32."""

    @classmethod
    def empty(
        cls,
        *,
        num_layers: int,
        rows: int,
        num_kv_heads: int,
        slots: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Allocate slots that hold nothing. Zeros, so that no stale NaN is ever read."""
        shape = (num_layers, rows, num_kv_heads, slots)
        return cls(
            keys=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            values=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            position=torch.full(shape, EMPTY, dtype=torch.int32, device=device),
            score=torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def view(self, rows: slice, slots: int) -> Self:
        """Return a window of the same memory: some rows, the first `slots` slots."""
        return type(self)(
            self.keys[:, rows, :, :slots],
            self.values[:, rows, :, :slots],
            self.position[:, rows, :, :slots],
            self.score[:, rows, :, :slots],
        )

    @property
    def width(self) -> int:
        """Slots of a row."""
        return self.position.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of these slots, read off the tensors."""
        return sum(t.nbytes for t in (self.keys, self.values, self.position, self.score))

    def clear(self) -> None:
        """Forget every token."""
        self.position.fill_(EMPTY)

    def free(self, count: int) -> Tensor:
        """Find each head's first `count` empty slots: [layers, rows, H_kv, count] int64."""
        taken = (self.position != EMPTY).to(torch.int8)
        return taken.argsort(dim=-1, stable=True)[..., :count]

    def victim(self, start: Tensor, policy: PolicyTensors) -> Tensor:
        """Find each head's slot to evict before a token is placed at `start`.

        Only rows that hold more than sinks + recent tokens have one; others get any slot.

        Returns:
            [layers, rows, H_kv] int64.
        """
        allowed = scoring.evictable(self.position, start, policy.sinks, policy.recent)
        return scoring.lowest(self.score, self.position, allowed)

    def evict(self, excess: Tensor, start: Tensor, policy: PolicyTensors) -> None:
        """Evict each head's `excess` lowest tokens.

        Args:
            excess: [rows] int64, how many to evict; a row must hold that many evictable tokens.
            start: [rows] int64, the position of the next token.
            policy: the rows' policies in these layers.
        """
        most = int(excess.max())
        if most <= 0:
            return
        allowed = scoring.evictable(self.position, start, policy.sinks, policy.recent)
        key = scoring.eviction_key(self.score, self.position, allowed)
        lowest = key.topk(most, dim=-1, largest=False).indices
        gone = torch.arange(most, device=excess.device) < excess[:, None, None]
        kept = self.position.gather(-1, lowest)
        self.position.scatter_(-1, lowest, torch.where(gone, EMPTY, kept))

    def place(self, slot: Tensor, position: Tensor, policy: PolicyTensors) -> None:
        """Let new tokens take slots, over whatever was there, with the score that they start from.

        Args:
            slot: [layers, rows, H_kv, width] int64, where each head puts each token.
            position: [rows, width] integer; `EMPTY` marks padding, which leaves its slot empty.
            policy: the rows' policies in these layers.
        """
        new = position.to(torch.int32)[:, None].expand_as(slot)
        self.position.scatter_(-1, slot, new)
        if policy.any_random:
            seed = policy.random_seed.clamp(min=0)
            hashes = scoring.random_scores(seed, policy.layers, slot.shape[2], position)
            self.score.scatter_(-1, slot, torch.where(policy.accumulating, 0.0, hashes))
        else:
            self.score.scatter_(-1, slot, 0.0)

    def write(self, layer: int, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values of new tokens in one layer.

        Args:
            layer: the layer, counted from the first of these.
            slot: [rows, H_kv, width] int64, where each head puts each token.
            keys, values: [rows, H_kv, width, D].
        """
        rows, heads, _ = slot.shape
        row = torch.arange(rows, device=slot.device)[:, None, None]
        head = torch.arange(heads, device=slot.device)[None, :, None]
        # Not `scatter_`, which in 16-bit dtypes copies the whole layer.
        self.keys[layer].index_put_((row, head, slot), keys)
        self.values[layer].index_put_((row, head, slot), values)

    def copy_row(self, row: int, source: Self, source_row: int, count: int) -> None:
        """Make `row` hold, in its first slots, the `count` tokens that `source_row` holds."""
        self.position[:, row].fill_(EMPTY)
        order = (source.position[:, source_row] == EMPTY).to(torch.int8)
        order = order.argsort(dim=-1, stable=True)[..., :count]
        for name in ("position", "score"):
            found = getattr(source, name)[:, source_row].gather(-1, order)
            getattr(self, name)[:, row, :, :count] = found
        # Layer by layer, so that what is gathered on the way stays small.
        for layer, slot in enumerate(order):
            wide = slot[..., None].expand(-1, -1, self.keys.shape[-1])
            for name in ("keys", "values"):
                found = getattr(source, name)[layer, source_row].gather(1, wide)
                getattr(self, name)[layer, row, :, :count] = found
