"""Where the slots of each layer and KV head lie in a row of the cache.

Owns the arithmetic: the heads of a layer lie one after the other, each with its own number of slots
and nothing between them. Knows nothing of tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

from a2sf.policy import Heads


@dataclass(frozen=True)
class Run:
    """Consecutive heads with equally many slots: some of one layer, or all of several layers."""

    layers: slice
    heads: slice
    width: int
    """Slots of each head."""
    pitch: int
    """Slots from the first one of a head to the first one of the next."""
    begin: int
    """The first slot of the first head, counted over the row's slots in all layers."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many layers and heads, and the pitch: how a row's slots from `begin` are cut."""
        layers, heads = self.layers, self.heads
        return layers.stop - layers.start, heads.stop - heads.start, self.pitch


@dataclass(frozen=True)
class Layout:
    """A row of slots, head by head."""

    slots: Heads
    """[layers][H_kv] how many each head has; it uses its first ones first."""
    pitches: Heads
    """[layers][H_kv] slots from the first one of a head to the first one of the next: more than it
    has where this is a view of a wider row."""

    @classmethod
    def packed(cls, slots: Heads) -> Self:
        """Lay out heads of so many slots, [layers][H_kv]."""
        return cls(slots, slots)

    def narrowed(self, slots: Heads) -> Self:
        """Return the same row, of which each head has only its first `slots` [layers][H_kv]."""
        pairs = zip(slots, self.slots, strict=True)
        assert all(n <= m for new, old in pairs for n, m in zip(new, old, strict=True))
        return type(self)(slots, self.pitches)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """[layers] slots of the whole row in each layer."""
        return tuple(map(sum, self.pitches))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """[layers] slots of the row in the layers before each."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    @cached_property
    def offsets(self) -> Heads:
        """[layers][H_kv] the first slot of each head, counted over the row's slots in its layer."""
        return tuple(tuple(accumulate(row, initial=0))[:-1] for row in self.pitches)

    @property
    def widest(self) -> int:
        """The most slots of a head."""
        return max(map(max, self.slots))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The row cut into as few runs as there can be, in order."""
        return tuple(self._runs())

    def _runs(self) -> Iterator[Run]:
        layer = 0
        while layer < len(self.slots):
            row, pitches = self.slots[layer], self.pitches[layer]
            if len(set(row)) == len(set(pitches)) == 1:
                end = layer + 1
                while (
                    end < len(self.slots)
                    and self.slots[end] == row
                    and self.pitches[end] == pitches
                ):
                    end += 1
                yield self._run(slice(layer, end), slice(0, len(row)))
                layer = end
                continue
            head = 0
            while head < len(row):
                end = head + 1
                while end < len(row) and (row[end], pitches[end]) == (row[head], pitches[head]):
                    end += 1
                yield self._run(slice(layer, layer + 1), slice(head, end))
                head = end
            layer += 1

    def _run(self, layers: slice, heads: slice) -> Run:
        layer, head = layers.start, heads.start
        return Run(
            layers=layers,
            heads=heads,
            width=self.slots[layer][head],
            pitch=self.pitches[layer][head],
            begin=self.starts[layer] + self.offsets[layer][head],
        )
