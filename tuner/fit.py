"""Runs one fit, from a dataset's name to a sealed table.

Owns the order of the steps: the best uniform setting, the stages that improve it, and the proof on
held-out examples. The code assumes one worker: the ledger shares measurements among workers and
stores them. Knows nothing of command lines; progress goes to standard error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import optuna

from a2sf import __version__
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.schema import AlphaTable, Calibration, Estimate, Evidence, Search, UniformSetting
from a2sf.tablefile import seal
from tuner import proof
from tuner.data import datasets, mixture, packing
from tuner.data.parts import Dataset
from tuner.evaluation import objective, statistics
from tuner.evaluation.objective import Objective
from tuner.progress import Progress
from tuner.proof import Proof
from tuner.search.space import FitSpec
from tuner.search.stages import SearchResult, search
from tuner.search.trials import Trials
from tuner.settings import MIN_EXAMPLES, FitSettings, few_examples_line, more_examples
from tuner.study.ledger import Ledger
from tuner.study.storage import open_storage

MIN_BUDGET = 8
"""Slots: room for the four sinks that the grid and the presets protect, and a few unprotected."""

SEARCH_VERSION = 5
"""Version of the search. Increase it after a change that makes earlier trials incomparable."""


@dataclass(frozen=True)
class Outcome:
    """The sealed table, and the results that have no field in the file."""

    table: AlphaTable
    full_nll: Estimate
    """Nats per token on the held-out examples, with the full cache."""
    nll: dict[str, Estimate]
    """The same under the fitted `table` and under each baseline."""
    notes: tuple[str, ...]
    """Steps that `trials` or `minutes` cut short, one sentence each."""
    limits: tuple[str, ...]
    """The options that ended the fit, sorted: --minutes, --trials, both or none."""
    remedy: str
    """What gives the proof more held-out examples."""


@dataclass(frozen=True)
class FitData:
    """The data of a fit: its data sets, and the examples made from them."""

    datasets: Sequence[Dataset]
    calibration: Sequence[Example]
    held_out: Sequence[Example]
    available: int
    """Held-out examples that the data gives, counted up to a number that is enough."""

    @property
    def names(self) -> str:
        """The names of the data sets, with commas between them."""
        return ",".join(dataset.name for dataset in self.datasets)

    @property
    def validation_split(self) -> str:
        """The held-out parts, by name."""
        return "+".join(dict.fromkeys(dataset.validation.split for dataset in self.datasets))

    def remedy(self, used: int | None = None) -> str:
        """What gives more held-out examples; `used`: those that fitted into the time, if known."""
        made = len(self.held_out)
        used = made if used is None else used
        return more_examples(made=made, available=self.available, used=used)

    def provenance(self, seed: int) -> Calibration:
        """The calibration data, as the table's file records it."""
        return Calibration(
            dataset=self.names,
            split="+".join(dict.fromkeys(dataset.calibration.split for dataset in self.datasets)),
            examples=len(self.calibration),
            tokens=sum(len(example.token_ids) for example in self.calibration),
            data_sha256=packing.digest(self.calibration),
            seed=seed,
        )


def fit(settings: FitSettings) -> Outcome:
    """Search, prove and seal. Raises A2SFError for errors that the user can correct."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chosen = datasets.load_all(settings.dataset, datasets.data_directory(settings.data_dir))
    with Progress("stage", settings.parts, about="at most about") as progress:
        progress.say(settings.plan)
        for dataset in chosen:
            progress.say(
                f"Data: {dataset.description}. The search uses calibration, the proof validation."
            )
        model = load_model(
            settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype
        )
        teacher_forcing.prepare(model)
        made = mixture.sequences_of(model, chosen, settings)
        data = FitData(chosen, made.calibration, made.held_out, made.available)
        few = few_examples_line(len(data.held_out), MIN_EXAMPLES, data.remedy())
        if few is not None:
            progress.say(few)
        spec = FitSpec(
            num_layers=model.shape.num_layers,
            num_kv_heads=model.shape.num_kv_heads,
            budget=settings.budget,
            budget_ratio=settings.budget_ratio,
            prefill_chunk=settings.prefill_chunk,
        )
        _check_budgets(model, spec, [*data.calibration, *data.held_out])
        ledger, storage_kind = _open_study(settings, model, data)
        trials = Trials(
            ledger,
            Objective(model, data.calibration, label="calibration", on_progress=progress.show),
            spec,
            settings.minutes,
            proof_rows=proof.max_rows(len(data.held_out), len(settings.stages)),
            progress=progress,
            max_trials=settings.trials,
        )
        found = search(trials, settings.stages, settings.trials, settings.seed)
        candidates = proof.candidates(spec, found, settings.seed)
        stages = {name: spec.policy(best.setting) for name, best in found.bests.items()}
        proved = proof.prove(ledger, trials, model, data.held_out, candidates, stages)
    costs = {name: proved.costs[name] for name in candidates}
    evidence = proof.judge(
        costs, proved.full_nll, found.uniform, data.names, data.validation_split, settings.seed
    )
    return Outcome(
        table=_sealed(settings, model, data, spec, found, proved, evidence, storage_kind),
        full_nll=statistics.estimate(proved.full_nll, seed=settings.seed),
        nll={name: statistics.estimate(c.nll, seed=settings.seed) for name, c in costs.items()},
        notes=tuple(trials.notes),
        limits=tuple(sorted(trials.limits)),
        remedy=data.remedy(len(proved.full_nll)),
    )


def _open_study(settings: FitSettings, model: LoadedModel, data: FitData) -> tuple[Ledger, str]:
    """Open the study and check that it is of this fit; return also the kind of its storage."""
    definition = {
        "model": model.identity.fingerprint,
        "dtype": model.dtype_name,
        "budget": settings.budget,
        "budget_ratio": settings.budget_ratio,
        "prefill_chunk": settings.prefill_chunk,
        "seed": settings.seed,
        "dataset": data.names,
        "examples": len(data.calibration),
        "length": settings.length,
        "data_sha256": packing.digest(data.calibration),
        "stages": list(settings.stages),
        "edition": SEARCH_VERSION,
    }
    storage, kind = open_storage(settings.storage, settings.journal)
    # One dtype for all workers and runs: figures in different dtypes are not comparable.
    chosen_here = {"dtype": model.dtype_reason} if settings.dtype == "auto" else {}
    return Ledger(storage, settings.study, definition, chosen=chosen_here), kind


def _sealed(
    settings: FitSettings,
    model: LoadedModel,
    data: FitData,
    spec: FitSpec,
    found: SearchResult,
    proved: Proof,
    evidence: Evidence,
    storage_kind: str,
) -> AlphaTable:
    """Seal the fitted policy, or the uniform one if the fitted one is not better."""
    wins = evidence.verdict == "better" or settings.keep_table
    return seal(
        name=settings.name,
        model=model.identity,
        policy=spec.policy(found.best.setting if wins else spec.uniform(found.uniform)),
        calibration=data.provenance(settings.seed),
        evidence=evidence,
        search=Search(
            sampler=",".join(found.bests),
            trials=sum(one.trials for one in found.stage_totals.values()),
            study=settings.study,
            storage=storage_kind,
            wall_seconds=round(sum(one.seconds for one in found.stage_totals.values()), 3),
            stages=proof.stages(found, proved, settings.seed),
        ),
        created_at=datetime.now(UTC).replace(microsecond=0),
        tool_version=__version__,
    )


def _check_budgets(model: LoadedModel, spec: FitSpec, examples: Sequence[Example]) -> None:
    probe = spec.policy(spec.uniform(UniformSetting(alpha=1.0, recent_share=0.0, sinks=0)))
    lengths = {len(example.token_ids) for example in examples}
    budgets = {length: objective.effective(probe, model, length).budget for length in lengths}
    shortest, longest = min(lengths), max(lengths)
    if budgets[shortest] < MIN_BUDGET:
        raise InvalidArgument(
            "budget",
            f"{budgets[shortest]} tokens for the shortest example of {shortest} tokens; accepted: "
            f"at least {MIN_BUDGET}",
        )
    if budgets[longest] >= longest:
        raise InvalidArgument(
            "budget",
            f"{budgets[longest]} tokens hold even the longest example of {longest} tokens whole, "
            "so that nothing would be evicted; lower the budget, or raise --length",
        )
