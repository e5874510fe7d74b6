"""The layout of a cache row: the location of each layer's and KV head's slots.

Owns the arithmetic. The heads of a layer are stored one after the other without gaps, each with its
own number of slots. Knows nothing of tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

from a2sf.policy import Heads


@dataclass(frozen=True)
class Run:
    """Consecutive heads with the same number of slots: in one layer, or all heads of several."""

    layers: slice
    heads: slice
    width: int
    """Number of slots of each head."""
    pitch: int
    """Number of slots from the first slot of a head to the first slot of the next head."""
    begin: int
    """Index of the first head's first slot, over the row's slots in all layers."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, heads, pitch): the shape of the row's slots from `begin` on."""
        layers, heads = self.layers, self.heads
        return layers.stop - layers.start, heads.stop - heads.start, self.pitch


@dataclass(frozen=True)
class Layout:
    """The slots of a row, by layer and head."""

    slots: Heads
    """[layers][H_kv] number of slots of each head; a head uses its first slots first."""
    pitches: Heads
    """[layers][H_kv] slots from the first slot of a head to the first slot of the next head. More
    than `slots` in a view of a wider row."""

    @classmethod
    def packed(cls, slots: Heads) -> Self:
        """Return a layout without gaps; `slots` [layers][H_kv] is the number of each head."""
        return cls(slots, slots)

    def narrowed(self, slots: Heads) -> Self:
        """Return a view of this row with only the first `slots` [layers][H_kv] of each head."""
        pairs = zip(slots, self.slots, strict=True)
        assert all(n <= m for new, old in pairs for n, m in zip(new, old, strict=True))
        return type(self)(slots, self.pitches)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """[layers] number of slots of the row in each layer."""
        return tuple(map(sum, self.pitches))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """[layers] number of slots of the row before each layer."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    @cached_property
    def offsets(self) -> Heads:
        """[layers][H_kv] index of each head's first slot, over the row's slots in its layer."""
        return tuple(tuple(accumulate(row, initial=0))[:-1] for row in self.pitches)

    @property
    def widest(self) -> int:
        """The largest number of slots of any head."""
        return max(map(max, self.slots))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The row as the fewest runs, in order."""
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
