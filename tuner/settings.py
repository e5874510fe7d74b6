"""The settings of a fit.

Owns the fields, the names of the stages, the line printed at the start, and how many held-out
examples are enough. Knows nothing of command lines or of how a table is found.
"""

from dataclasses import dataclass
from pathlib import Path

from tuner.progress import duration

OPEN_ENDED_STAGES = ("polish", "tpe", "cma")
"""Stages that continue as long as there are trials; the others end by themselves."""

STAGES = ("sensitivity", "alphas", "slots", "layers", "heads", "protection", *OPEN_ENDED_STAGES)
"""The stages that may follow the uniform one, by the names that users give."""

PROFILE_STAGES = ("sensitivity", "alphas")
"""Stages based on the sensitivity profile. After the first, layers are measured as a baseline."""

PROOF = "proof"
"""The last part."""

PER_LAYER = "per layer"
"""The baseline with all heads of a layer alike."""

DEFAULT_STAGES = ("sensitivity", "alphas", "protection", "polish")


MIN_EXAMPLES = 9
"""Fewest held-out examples of a proof, if as many were asked for. With fewer, not even a gain in
every example could be significant after the correction for ten comparisons: 10 x 2 / 2^8 is .08."""

FEW_EXAMPLES = 16
"""Number of held-out examples below which bootstrap intervals are rough."""

MORE_SEQUENCES = "more rows in the data, or a smaller --length"
"""What makes more sequences from a data set."""


def bare_name(out: Path) -> str:
    """The name of a table's file without `.json`; the end of `x-0.2` is no suffix."""
    return out.stem if out.suffix == ".json" else out.name


@dataclass(frozen=True)
class FitSettings:
    """The request of the user. Exactly one of `budget` (tokens) and `budget_ratio` is set."""

    dataset: str
    """One dataset, or several with commas between them."""
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
    """Largest number of settings measured, over all stages, runs and workers; at least one is
    measured."""
    minutes: float | None
    """Minutes of measuring, including the proof, summed over workers; None: no limit."""
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
        """The file of the study without a storage: beside the table."""
        return self.out.with_name(f"{bare_name(self.out)}.journal")

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts of the fit, in order."""
        profile_places = [
            place for place, name in enumerate(self.stages, start=1) if name in PROFILE_STAGES
        ]
        after = profile_places[0] if profile_places else 0
        per_layer = (PER_LAYER,) if profile_places else ()
        return ("uniform", *self.stages[:after], *per_layer, *self.stages[after:], PROOF)

    @property
    def plan(self) -> str:
        """The plan, the place of the table, and the time limit, in one line."""
        limit = f"{self.trials} trials"
        if self.minutes is not None:
            limit = f"{duration(60 * self.minutes)} of measuring and {limit}"
        study = "in the given storage" if self.storage else f"{self.journal}"
        return (
            f"Fitting a table for {self.model} to {self.dataset}: {len(self.parts)} stages "
            f"({', '.join(self.parts)}), at most {limit}, after the model is loaded. Table: "
            f"{self.out}; study: {study}."
        )


def few_examples_line(examples: int, enough: int, remedy: str) -> str | None:
    """Return a warning about a number of held-out examples, with what gives more; None if many."""
    if examples < enough:
        return (
            f"Too few examples: {examples} held-out examples cannot show a difference after the "
            f"correction for all comparisons. A verdict needs at least {enough}, and good "
            f"intervals {FEW_EXAMPLES}. What helps: {remedy}."
        )
    if examples < FEW_EXAMPLES:
        return (
            f"Few examples: {examples} held-out examples give rough intervals; good ones need "
            f"{FEW_EXAMPLES}. What helps: {remedy}."
        )
    return None


def more_examples(*, made: int, available: int, used: int) -> str:
    """Say what gives a proof more held-out examples.

    Args:
        made: sequences that the fit made for the proof.
        available: sequences that the data gives, counted up to FEW_EXAMPLES or `made`.
        used: sequences that fitted into the time.
    """
    helps = ["more --minutes"] if used < made else []
    if made < FEW_EXAMPLES:
        enough = available >= FEW_EXAMPLES
        helps.append(f"--holdout {FEW_EXAMPLES} or more" if enough else MORE_SEQUENCES)
    return ", and ".join(helps)
