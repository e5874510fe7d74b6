"""What a fit is asked for.

Owns the fields, and the line that says at the start what will be done. Knows nothing of command
lines, nor of how a table is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.progress import duration


@dataclass(frozen=True)
class Settings:
    """What the user asked for. Exactly one of `budget` (tokens) and `budget_ratio` is set."""

    dataset: str
    """One, or several with commas between them."""
    out: Path
    name: str
    study: str
    model: str
    revision: str | None
    budget: int | None
    budget_ratio: float | None
    prefill_chunk: int
    data_dir: Path | None
    stages: tuple[str, ...]
    trials: int
    """Settings measured in all, over all stages, runs and workers; at least one is."""
    minutes: float | None
    """Of measuring, the proof included and summed over workers; None: no limit."""
    examples: int
    holdout: int | None
    """Held-out examples; None: twice `examples` and at least 16, or as many as there are."""
    length: int
    seed: int
    storage: str | None
    device: str
    dtype: str
    keep_table: bool

    @property
    def journal(self) -> Path:
        """Where the study is kept unless there is a storage: beside the table."""
        return self.out.with_suffix(".journal")

    def told(self, stages: Sequence[str]) -> str:
        """What a fit will do, where it goes, and how long it takes at most, in one line."""
        limit = f"{self.trials} trials"
        if self.minutes is not None:
            limit = f"{duration(60 * self.minutes)} of measuring and {limit}"
        study = "in the given storage" if self.storage else f"in {self.journal}"
        return (
            f"Fitting a table for {self.model} to {self.dataset}: {len(stages)} stages "
            f"({', '.join(stages)}), at most {limit}, after the model is loaded; the table goes to "
            f"{self.out}, the study is kept {study}."
        )
