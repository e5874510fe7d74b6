"""Makes the examples of a fit from one data set or several.

Owns the shares of the data sets in a mixture, and the default number of held-out examples. Knows
nothing of searching.
"""

from collections.abc import Sequence

from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.offline.teacher_forcing import Example
from tuner.data import packing
from tuner.data.parts import Dataset
from tuner.settings import FitSettings


def examples_of(
    model: LoadedModel, chosen: Sequence[Dataset], settings: FitSettings
) -> tuple[list[Example], list[Example]]:
    """Make sequences for the search and for the proof, equally many from each dataset, in turn."""
    counts = {
        "examples": settings.examples,
        "holdout": settings.holdout or max(2 * settings.examples, 16),
    }
    sequences = {}
    for field, count in counts.items():
        each = -(-count // len(chosen))
        enough = 2 if field == "holdout" and settings.holdout is None else each
        parts = []
        for dataset in chosen:
            part = dataset.calibration if field == "examples" else dataset.validation
            parts.append(
                packing.examples(
                    model, part, count=each, length=settings.length, seed=settings.seed
                )
            )
            if len(parts[-1]) < enough:
                raise InvalidArgument(
                    field,
                    f"{enough} sequences of about {settings.length} tokens, and {part.split} of "
                    f"{dataset.name} gives {len(parts[-1])}; lower --{field}, or change --length: "
                    "rows that are longer are left out",
                )
        turns = zip(*(part[: min(map(len, parts))] for part in parts), strict=True)
        sequences[field] = [example for turn in turns for example in turn][:count]
    return sequences["examples"], sequences["holdout"]
