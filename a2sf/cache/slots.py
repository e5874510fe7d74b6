"""The slot cache: each sequence has a row of slots, split among layers and KV heads.

Owns the tensors and the operations on them: place, write, evict, copy a row. A slot holds a key
(rotated for its own position), a value, the token's position and its score. `scoring` decides which
tokens to keep, `layout` where the slots of each head are. The order of slots has no meaning; a slot
is empty if its position is `EMPTY`. Adjacent heads with the same number of slots are processed
together, as a `Rectangle`. Knows nothing of queries, models or requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from a2sf.cache import scoring
from a2sf.cache.layout import Layout, Run
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.scoring import EMPTY
from a2sf.policy import Heads

SLOT_OVERHEAD_BYTES = 8
"""Bytes per slot for the position and the score, in addition to key and value."""


@dataclass(frozen=True)
class Rectangle:
    """A view of `Slots`: some rows of consecutive heads with the same number of slots."""

    keys: tuple[Tensor, ...]
    """One tensor per layer, [rows, heads, slots, D] in the model's dtype."""
    values: tuple[Tensor, ...]
    """One tensor per layer, [rows, heads, slots, D] in the model's dtype."""
    position: Tensor
    """[layers, rows, heads, slots] int32, `EMPTY` in slots without a token."""
    score: Tensor
    """[layers, rows, heads, slots] float32."""

    def blank(self, slots: slice) -> None:
        """Set keys and values to zero in these slots of every head.

        Attention multiplies the value of an empty slot by 0, and 0 x NaN is NaN.
        """
        for tensor in (*self.keys, *self.values):
            tensor[:, :, slots].zero_()

    def free(self, count: int) -> Tensor:
        """Find each head's first `count` empty slots: [layers, rows, heads, count] int64."""
        taken = (self.position != EMPTY).to(torch.int8)
        return taken.argsort(dim=-1, stable=True)[..., :count]

    def victim(self, start: Tensor, policy: PolicyTensors) -> Tensor:
        """Find the slot of each head to evict before a token is placed at `start`.

        A head that holds at most sinks + recent tokens has no victim; its result is undefined.

        Returns:
            [layers, rows, heads] int64.
        """
        allowed = scoring.evictable(self.position, start, policy.sinks, policy.recent)
        return scoring.eviction_key(self.score, self.position, allowed).argmin(dim=-1)

    def evict(self, num_to_evict: Tensor, start: Tensor, policy: PolicyTensors) -> None:
        """Evict the tokens with the lowest scores in each head.

        Args:
            num_to_evict: [layers, rows, heads] int64; each head must hold at least that many
                evictable tokens.
            start: [rows] int64, the position of the next token.
            policy: the rows' policies in these layers and heads.
        """
        most = int(num_to_evict.max())
        if most <= 0:
            return
        allowed = scoring.evictable(self.position, start, policy.sinks, policy.recent)
        key = scoring.eviction_key(self.score, self.position, allowed)
        lowest = key.topk(most, dim=-1, largest=False).indices
        gone = torch.arange(most, device=num_to_evict.device) < num_to_evict[..., None]
        kept = self.position.gather(-1, lowest)
        self.position.scatter_(-1, lowest, torch.where(gone, EMPTY, kept))

    def place(self, slot: Tensor, position: Tensor, policy: PolicyTensors) -> None:
        """Place new tokens in slots, overwriting them, and set their initial scores.

        Args:
            slot: [layers, rows, heads, width] int64, the slot of each token in each head.
            position: [rows, width] integer; `EMPTY` for padding, whose slot becomes empty.
            policy: the rows' policies in these layers and heads.
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
            layer: the index of the layer within this rectangle.
            slot: [rows, heads, width] int64, the slot of each token in each head.
            keys, values: [rows, heads, width, D].
        """
        rows, heads, _ = slot.shape
        row = torch.arange(rows, device=slot.device)[:, None, None]
        head = torch.arange(heads, device=slot.device)[None, :, None]
        # `scatter_` would copy the whole layer in 16-bit dtypes.
        self.keys[layer].index_put_((row, head, slot), keys)
        self.values[layer].index_put_((row, head, slot), values)


@dataclass(frozen=True)
class HeadLocations:
    """The location of each head's slots, as tensors on the device, for compiled kernels."""

    vectors: Tensor
    """[layers, H_kv] int64: index of each head's first slot in a row of the layer's keys/values."""
    marks: Tensor
    """[layers, H_kv] int64: index of each head's first slot in a row of positions and scores."""
    width: Tensor
    """[layers, H_kv] int64: number of slots of each head."""
    order: Tensor
    """[layers, H_kv] int64: the heads of each layer, sorted by falling number of slots."""


@dataclass(frozen=True)
class Slots:
    """Slots of some rows in some layers, arranged by a `Layout`, without gaps between heads."""

    layout: Layout
    keys: tuple[Tensor, ...]
    """One tensor per layer, [rows, slots of the layer, D] in the model's dtype."""
    values: tuple[Tensor, ...]
    """One tensor per layer, [rows, slots of the layer, D] in the model's dtype."""
    position: Tensor
    """[rows, slots of all layers] int32, `EMPTY` in slots without a token."""
    score: Tensor
    """[rows, slots of all layers] float32."""

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
        """Allocate empty slots: `slots` [layers][H_kv] is the number per row and head.

        Filled with zeros, so that unwritten memory is never read as NaN.
        """
        layout = Layout.packed(slots)

        def vectors() -> tuple[Tensor, ...]:
            shapes = [(rows, size, head_dim) for size in layout.sizes]
            return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)

        shape = (rows, sum(layout.sizes))
        return cls(
            layout=layout,
            keys=vectors(),
            values=vectors(),
            position=torch.full(shape, EMPTY, dtype=torch.int32, device=device),
            score=torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def view(self, rows: slice, slots: Heads | None = None) -> Self:
        """Return a view of some rows and of each head's first `slots` (None: all)."""
        return type(self)(
            self.layout if slots is None else self.layout.narrowed(slots),
            tuple(tensor[rows] for tensor in self.keys),
            tuple(tensor[rows] for tensor in self.values),
            self.position[rows],
            self.score[rows],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of these rows' tensors."""
        return sum(t.nbytes for t in (*self.keys, *self.values, self.position, self.score))

    @cached_property
    def parts(self) -> tuple[tuple[Run, Rectangle], ...]:
        """The slots as the fewest rectangles; one if all heads have the same number of slots."""
        return tuple((run, self._rectangle(run)) for run in self.layout.runs)

    @property
    def whole(self) -> Rectangle:
        """The slots as one rectangle; all heads must have the same number of slots."""
        ((_, rectangle),) = self.parts
        return rectangle

    @cached_property
    def head_locations(self) -> HeadLocations:
        """The location of the heads, as tensors."""
        layout = self.layout

        def integers(rows: Heads) -> Tensor:
            return torch.tensor(rows, dtype=torch.int64, device=self.position.device)

        starts = torch.tensor(layout.starts, device=self.position.device)
        vectors, width = integers(layout.offsets), integers(layout.slots)
        return HeadLocations(
            vectors=vectors,
            marks=vectors + starts[:, None],
            width=width,
            order=width.argsort(dim=1, descending=True, stable=True),
        )

    def clear(self) -> None:
        """Mark all slots empty and zero the scores. Keys and values are not erased."""
        self.position.fill_(EMPTY)
        self.score.zero_()

    def scrub(self, row: int) -> None:
        """Reset a row to its state after allocation, keys and values included."""
        for tensor in (*self.keys, *self.values):
            tensor[row].zero_()
        self.position[row].fill_(EMPTY)
        self.score[row].zero_()

    def victim(self, start: Tensor, policy: PolicyTensors) -> Tensor:
        """As `Rectangle.victim`, for all heads: [layers, rows, H_kv] int64."""
        found = [(run, part.victim(start, policy.part(run))) for run, part in self.parts]
        if len(found) == 1:
            return found[0][1]
        victims = torch.empty_like(policy.budget)
        for run, part in found:
            victims[run.layers, :, run.heads] = part
        return victims

    def move_row(self, row: int, source: int) -> None:
        """Copy all slots of the row `source` to `row`."""
        for tensor in (*self.keys, *self.values, self.position, self.score):
            tensor[row] = tensor[source]

    def copy_row(
        self, row: int, source: Self, source_row: int, counts: Sequence[Sequence[int]]
    ) -> None:
        """Copy the tokens of `source_row` to the first slots of each head of `row`.

        Args:
            row: a row of these slots.
            source, source_row: the row to copy from. All its heads have the same number of slots;
                the tokens may be in any of them.
            counts: [layers][H_kv] tokens in each head of that row.
        """
        theirs = source.whole
        # Heads with fewer tokens than the maximum copy empty slots after their tokens.
        order = (theirs.position[:, source_row] == EMPTY).to(torch.int8)
        order = order.argsort(dim=-1, stable=True)[..., : max(map(max, counts))]
        found = [t[:, source_row].gather(-1, order) for t in (theirs.position, theirs.score)]
        self.position[row].fill_(EMPTY)
        for run, mine in self.parts:
            here = counts[run.layers]
            most = max(max(layer[run.heads]) for layer in here)
            for tensor, copied in zip((mine.position, mine.score), found, strict=True):
                tensor[:, row, :, :most] = copied[run.layers, run.heads, :most]
            # One layer at a time, to keep the gathered tensors small.
            for index, layer in enumerate(here):
                count, at = max(layer[run.heads]), run.layers.start + index
                slot = order[at, run.heads, :count, None]
                for to, by in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    vectors = by[at][source_row, run.heads]
                    wide = slot.expand(-1, -1, vectors.shape[-1])
                    to[index][row, :, :count] = vectors.gather(1, wide)

    def _rectangle(self, run: Run) -> Rectangle:
        layers, heads, pitch = run.shape

        def vectors(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            begin = run.begin - self.layout.starts[run.layers.start]
            mine = (tensor[:, begin : begin + heads * pitch] for tensor in tensors[run.layers])
            return tuple(t.view(len(t), heads, pitch, -1)[:, :, : run.width] for t in mine)

        def marks(tensor: Tensor) -> Tensor:
            mine = tensor[:, run.begin : run.begin + layers * heads * pitch]
            return mine.view(len(mine), *run.shape).transpose(0, 1)[..., : run.width]

        return Rectangle(
            vectors(self.keys), vectors(self.values), marks(self.position), marks(self.score)
        )
