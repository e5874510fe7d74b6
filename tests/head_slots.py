"""Views of one head's slots in one row, for any layout."""

from dataclasses import dataclass

from torch import Tensor

from a2sf.cache.scoring import EMPTY
from a2sf.cache.slots import Slots


@dataclass
class HeadSlots:
    """Views of a head's slots: keys and values [slots, D], position and score [slots]."""

    keys: Tensor
    values: Tensor
    position: Tensor
    score: Tensor

    def stored(self) -> dict[int, float]:
        """The score of each stored token, by position."""
        occupied = self.position != EMPTY
        return dict(
            zip(self.position[occupied].tolist(), self.score[occupied].tolist(), strict=True)
        )


def head_of(slots: Slots, layer: int, row: int, head: int) -> HeadSlots:
    """The slots of a head; its offset is the sum of the slots before it."""
    before = slots.layout.pitches
    first = sum(before[layer][:head])
    mark = sum(map(sum, before[:layer])) + first
    width = slots.layout.slots[layer][head]
    return HeadSlots(
        slots.keys[layer][row, first : first + width],
        slots.values[layer][row, first : first + width],
        slots.position[row, mark : mark + width],
        slots.score[row, mark : mark + width],
    )
