"""Makes the examples of a fit from one data set or several.

Owns the shares of the data sets in a mixture, the default number of held-out examples, and how
many there could be. Knows nothing of searching.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.offline.teacher_forcing import Example
from tuner.data import packing
from tuner.data.parts import Dataset
from tuner.settings import FEW_EXAMPLES, MIN_EXAMPLES, FitSettings


@dataclass(frozen=True)
class Sequences:
    """The sequences of a fit."""

    calibration: list[Example]
    held_out: list[Example]
    available: int
    """Held-out sequences that the data gives, counted up to FEW_EXAMPLES or those of `held_out`."""


def sequences_of(model: LoadedModel, chosen: Sequence[Dataset], settings: FitSettings) -> Sequences:
    """Make sequences for the search and for the proof, equally many from each dataset, in turn."""

    def made(field: str, count: int, least: int | None = None) -> list[Example]:
        each = -(-count // len(chosen))
        parts = []
        for dataset in chosen:
            part = dataset.calibration if field == "examples" else dataset.validation
            parts.append(
                packing.examples(
                    model, part, count=each, length=settings.length, seed=settings.seed
                )
            )
            enough = each if least is None else least
            if len(parts[-1]) < enough:
                verdict = f"; a verdict needs {MIN_EXAMPLES}" if field == "holdout" else ""
                raise InvalidArgument(
                    field,
                    f"{enough} sequences of about {settings.length} tokens, and {part.split} of "
                    f"{dataset.name} gives {len(parts[-1])}; add rows, or change --length (a "
                    "smaller one gives more sequences, but rows that are longer than it are left "
                    f"out), or lower --{field}{verdict}",
                )
        turns = zip(*(part[: min(map(len, parts))] for part in parts), strict=True)
        return [example for turn in turns for example in turn]

    calibration = made("examples", settings.examples)[: settings.examples]
    if settings.holdout is None:
        count = max(2 * settings.examples, FEW_EXAMPLES)
        held_out = made("holdout", count, least=2)
        return Sequences(calibration, held_out[:count], len(held_out))
    held_out = made("holdout", settings.holdout)[: settings.holdout]
    # The first sequences are the same, however many follow them.
    more = made("holdout", FEW_EXAMPLES, least=0) if settings.holdout < FEW_EXAMPLES else held_out
    return Sequences(calibration, held_out, len(more))
