"""The slot cache: rectangles of slots, one a layer, row and KV head, and how tokens come and go.

Owns the tensors and the moves on them: place, write, evict, copy a row. A slot holds a key
(rotated for its own position), a value, the token's position and its score; which tokens to keep
is decided by `scoring`. Slot order means nothing: a slot is empty when its position says so. Layers
may differ in width, and slots beyond a layer's own stay empty. Knows nothing of queries, models or
requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from a2sf import scoring
from a2sf.policy import EffectivePolicy, Heads
from a2sf.scoring import EMPTY

SLOT_OVERHEAD_BYTES = 8
"""Bytes of a slot beside its key and value: the position and the score."""


@dataclass(frozen=True)
class PolicyTensors:
    """The policies of a batch's rows in some layers, on the cache's device."""

    first_heads: Tensor
    """[layers] int64, the number of each layer's first head, from `scoring.first_heads`."""
    alpha: Tensor
    """[layers, rows, H_kv] float64; double, so that powers of it agree wherever they are taken."""
    budget: Tensor
    """[layers, rows, H_kv] int64, slots."""
    recent: Tensor
    """[layers, rows, H_kv] int64, tokens."""
    sinks: Tensor
    """[rows] int64, tokens."""
    random_seed: Tensor
    """[rows] int64; -1 where scores are accumulated."""
    scored: Tensor
    """[rows] bool: whether a row's evictions hang on its attention."""
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
        them evicts nothing, so nobody asks for its scores. All policies are for the same heads.
        """

        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def of_heads(values: Sequence[Heads]) -> Tensor:
            return torch.tensor(values, device=device).transpose(0, 1).contiguous()

        held = [p.held_alpha for p in policies]
        alpha = torch.tensor(held, dtype=torch.float64, device=device)
        layers = torch.arange(alpha.shape[1], device=device)
        scored = [
            p.scored and min(map(min, p.head_budgets)) < length
            for p, length in zip(policies, lengths, strict=True)
        ]
        return cls(
            first_heads=scoring.first_heads(layers, policies[0].first_head),
            alpha=alpha.transpose(0, 1).contiguous(),
            budget=of_heads([p.held_budgets for p in policies]),
            recent=of_heads([p.held_recents for p in policies]),
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
        """Return room for the policies of rows; until then each keeps one token, unscored."""

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
        """Make `row` follow the policy of `source_row`, but for what is known of all rows."""
        for name in ("alpha", "budget", "recent"):
            getattr(self, name)[:, row] = getattr(source, name)[:, source_row]
        for name in ("sinks", "random_seed", "scored"):
            getattr(self, name)[row] = getattr(source, name)[source_row]
        self.first_heads.copy_(source.first_heads)

    @property
    def accumulating(self) -> Tensor:
        """[rows, 1, 1] bool: whether a row's scores grow with what its queries pay."""
        return (self.random_seed < 0)[:, None, None]

    def rows(self, rows: slice) -> Self:
        """Return the policies of some rows, in the same memory."""
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
        """Return what concerns one layer, as a stack of one."""
        one = slice(index, index + 1)
        return replace(
            self,
            first_heads=self.first_heads[one],
            alpha=self.alpha[one],
            budget=self.budget[one],
            recent=self.recent[one],
        )


@dataclass(frozen=True)
class Slots:
    """Slots of some rows in some layers."""

    keys: tuple[Tensor, ...]
    """Of each layer [rows, H_kv, slots of the layer, D] in the model's dtype."""
    values: tuple[Tensor, ...]
    """Of each layer [rows, H_kv, slots of the layer, D] in the model's dtype."""
    position: Tensor
    """[layers, rows, H_kv, slots] int32, `EMPTY` where no token is; as wide as the widest layer, so
    that one operation serves all layers."""
    score: Tensor
    """[layers, rows, H_kv, slots] float32."""

    @classmethod
    def empty(
        cls,
        *,
        rows: int,
        slots: Heads,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Allocate slots that hold nothing, `slots` [layers][H_kv] of a row in each head.

        Zeros, so that no NaN is ever read that nobody wrote.
        """

        num_kv_heads, widths = len(slots[0]), [max(layer) for layer in slots]

        def vectors() -> tuple[Tensor, ...]:
            shapes = [(rows, num_kv_heads, width, head_dim) for width in widths]
            return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)

        shape = (len(slots), rows, num_kv_heads, max(widths))
        return cls(
            keys=vectors(),
            values=vectors(),
            position=torch.full(shape, EMPTY, dtype=torch.int32, device=device),
            score=torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def view(self, rows: slice, slots: Sequence[int]) -> Self:
        """Return a window of the same memory: some rows, each layer's first `slots` [layers]."""
        widest = max(slots)
        return type(self)(
            tuple(t[rows, :, :width] for t, width in zip(self.keys, slots, strict=True)),
            tuple(t[rows, :, :width] for t, width in zip(self.values, slots, strict=True)),
            self.position[:, rows, :, :widest],
            self.score[:, rows, :, :widest],
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """[layers] slots of a row."""
        return tuple(keys.shape[2] for keys in self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of these slots, read off the tensors."""
        return sum(t.nbytes for t in (*self.keys, *self.values, self.position, self.score))

    def clear(self) -> None:
        """Forget every token and every score. Keys and values stay where they are."""
        self.position.fill_(EMPTY)
        self.score.zero_()

    def blank(self, rows: slice, slots: slice) -> None:
        """Put zeros where keys and values were, in these slots of every layer.

        An empty slot takes part in attention with the weight 0, and 0 x NaN is NaN.
        """
        for tensor in (*self.keys, *self.values):
            tensor[rows, :, slots].zero_()

    def scrub(self, row: int) -> None:
        """Make a row as it was when it was allocated, whatever it holds."""
        self.blank(slice(row, row + 1), slice(None))
        self.position[:, row].fill_(EMPTY)
        self.score[:, row].zero_()

    def free(self, count: int) -> Tensor:
        """Find each head's first `count` empty slots: [layers, rows, H_kv, count] int64.

        For layers of one width: it does not tell a narrow layer's empty slots from those beyond.
        """
        assert len(set(self.widths)) == 1, "prompts are prefilled where all layers are as wide"
        taken = (self.position != EMPTY).to(torch.int8)
        return taken.argsort(dim=-1, stable=True)[..., :count]

    def victim(self, start: Tensor, policy: PolicyTensors) -> Tensor:
        """Find each head's slot to evict before a token is placed at `start`.

        Only rows that hold more than sinks + recent tokens have one; others get any slot.

        Returns:
            [layers, rows, H_kv] int64.
        """
        allowed = scoring.evictable(self.position, start, policy.sinks, policy.recent)
        return scoring.eviction_key(self.score, self.position, allowed).argmin(dim=-1)

    def evict(self, excess: Tensor, start: Tensor, policy: PolicyTensors) -> None:
        """Evict each head's `excess` lowest tokens.

        Args:
            excess: [layers, rows, H_kv] int64, how many to evict; the head must hold that many
                evictable tokens.
            start: [rows] int64, the position of the next token.
            policy: the rows' policies in these layers.
        """
        most = int(excess.max())
        if most <= 0:
            return
        allowed = scoring.evictable(self.position, start, policy.sinks, policy.recent)
        key = scoring.eviction_key(self.score, self.position, allowed)
        lowest = key.topk(most, dim=-1, largest=False).indices
        gone = torch.arange(most, device=excess.device) < excess[..., None]
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
            hashes = scoring.random_scores(seed, policy.first_heads, slot.shape[2], position)
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

    def copy_row(
        self, row: int, source: Self, source_row: int, counts: Sequence[Sequence[int]]
    ) -> None:
        """Make `row` hold, in each head's first slots, the tokens that `source_row` holds.

        `counts` [layers][H_kv] says how many those are.
        """
        widths = [max(layer) for layer in counts]
        most = max(widths)
        self.position[:, row].fill_(EMPTY)
        order = (source.position[:, source_row] == EMPTY).to(torch.int8)
        # Heads that hold fewer than the most copy empty slots after their tokens.
        order = order.argsort(dim=-1, stable=True)[..., :most]
        for name in ("position", "score"):
            found = getattr(source, name)[:, source_row].gather(-1, order)
            getattr(self, name)[:, row, :, :most] = found
        # Layer by layer, so that what is gathered on the way stays small.
        for layer, count in enumerate(widths):
            slot = order[layer, :, :count, None]
            for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
                wide = slot.expand(-1, -1, theirs[layer].shape[-1])
                mine[layer][row, :, :count] = theirs[layer][source_row].gather(1, wide)
