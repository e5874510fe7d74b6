"""Runs one fit, from a dataset's name to a sealed table.

Owns the order of the steps: the best uniform setting, the stages that improve it, and the proof on
held-out examples. The code assumes one worker: the ledger shares measurements among workers and
stores them. Knows nothing of command lines; progress goes to standard error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import optuna

from a2sf import __version__
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.schema import AlphaTable, Calibration, Estimate, Search, UniformSetting
from a2sf.tablefile import seal
from tuner import proof
from tuner.data import datasets, packing
from tuner.evaluation import objective, statistics
from tuner.evaluation.objective import Objective
from tuner.progress import Progress
from tuner.search import samplers, sensitivity
from tuner.search.moves import Climb
from tuner.search.space import Frame
from tuner.search.trials import Account, Trials, Tried
from tuner.search.uniform import best_uniform
from tuner.settings import OPEN, PER_LAYER, Settings
from tuner.study.ledger import Ledger
from tuner.study.storage import open_storage

LEAST_BUDGET = 8
"""Slots: room for the four sinks that the grid and the presets protect, and a few unprotected."""

EDITION = 5
"""Version of the search. Increase it after a change that makes earlier trials incomparable."""


RIVAL_SHARE = 0.2
"""Share of the search time that is left which the baseline `per layer` may use. It runs before the
later stages of the table, and must not take their time."""


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


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    uniform: UniformSetting
    bests: dict[str, Tried]
    """The best setting after each stage, in order; `uniform` is the first."""
    per_layer: Tried | None
    """The best setting with one share of the slots and one alpha per layer; None if none was
    measured."""
    accounts: dict[str, Account]


def fit(settings: Settings) -> Outcome:
    """Search, prove and seal. Raises A2SFError for errors that the user can correct."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chosen = datasets.load_all(settings.dataset, datasets.data_directory(settings.data_dir))
    with Progress("stage", settings.parts, about="at most about") as progress:
        progress.say(settings.told)
        for dataset in chosen:
            progress.say(f"Data: {dataset.told}.")
        return _fit(settings, chosen, progress)


def _fit(settings: Settings, chosen: Sequence[datasets.Dataset], progress: Progress) -> Outcome:
    model = load_model(
        settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype
    )
    teacher_forcing.prepare(model)
    calibration, held_out = _examples(model, chosen, settings)
    frame = Frame(
        num_layers=model.shape.num_layers,
        num_kv_heads=model.shape.num_kv_heads,
        budget=settings.budget,
        budget_ratio=settings.budget_ratio,
        prefill_chunk=settings.prefill_chunk,
    )
    _check_budgets(model, frame, [*calibration, *held_out])
    names = ",".join(dataset.name for dataset in chosen)
    data_sha256 = packing.digest(calibration)
    definition = {
        "model": model.identity.fingerprint,
        "dtype": model.dtype_name,
        "budget": settings.budget,
        "budget_ratio": settings.budget_ratio,
        "prefill_chunk": settings.prefill_chunk,
        "seed": settings.seed,
        "dataset": names,
        "examples": len(calibration),
        "length": settings.length,
        "data_sha256": data_sha256,
        "stages": list(settings.stages),
        "edition": EDITION,
    }
    storage, storage_kind = open_storage(settings.storage, settings.journal)
    # One dtype for all workers and runs: figures in different dtypes are not comparable.
    chosen_here = {"dtype": model.dtype_reason} if settings.dtype == "auto" else {}
    ledger = Ledger(storage, settings.study, definition, chosen=chosen_here)
    trials = Trials(
        ledger,
        Objective(model, calibration, label="calibration", watch=progress.show),
        frame,
        settings.minutes,
        proof_rows=proof.rows(len(held_out), len(settings.stages)),
        progress=progress,
        most=settings.trials,
    )
    reload = partial(
        load_model,
        settings.model,
        revision=settings.revision,
        device=settings.device,
        # The dtype chosen above; a second choice may differ, because it depends on a measurement.
        dtype=model.dtype_name,
        pack=False,
    )
    found = search(trials, settings.stages, settings.trials, settings.seed, reload)
    fitted = frame.policy(list(found.bests.values())[-1].setting)
    uniform = frame.policy(frame.uniform(found.uniform))

    stages = {name: frame.policy(best.setting) for name, best in found.bests.items()}
    presets = proof.baselines(frame, found.uniform, settings.seed)
    if found.per_layer is not None:
        presets[PER_LAYER] = frame.policy(found.per_layer.setting)
    candidates = {"table": fitted, "uniform": uniform, **presets}
    proved = proof.prove(ledger, trials, model, held_out, candidates, stages)
    costs = proved.costs
    compared = {name: costs[name] for name in ("table", "uniform", *presets)}
    split = "+".join(dict.fromkeys(dataset.validation.split for dataset in chosen))
    evidence = proof.judge(compared, proved.full_nll, found.uniform, names, split, settings.seed)
    wins = evidence.verdict == "better" or settings.keep_table
    table = seal(
        name=settings.name,
        model=model.identity,
        policy=fitted if wins else uniform,
        calibration=Calibration(
            dataset=names,
            split="+".join(dict.fromkeys(dataset.calibration.split for dataset in chosen)),
            examples=len(calibration),
            tokens=sum(len(example.token_ids) for example in calibration),
            data_sha256=data_sha256,
            seed=settings.seed,
        ),
        evidence=evidence,
        search=Search(
            sampler=",".join(found.bests),
            trials=sum(found.accounts[name].trials for name in settings.stages),
            study=settings.study,
            storage=storage_kind,
            wall_seconds=round(sum(a.seconds for a in found.accounts.values()), 3),
            stages=tuple(
                proof.stage(
                    name,
                    found.accounts[name],
                    best,
                    costs[f"stage {name}"].kl,
                    costs["uniform"].kl,
                    settings.seed,
                )
                for name, best in found.bests.items()
            ),
        ),
        created_at=datetime.now(UTC).replace(microsecond=0),
        tool_version=__version__,
    )
    return Outcome(
        table=table,
        full_nll=statistics.estimate(proved.full_nll, seed=settings.seed),
        nll={
            name: statistics.estimate(cost.nll, seed=settings.seed)
            for name, cost in compared.items()
        },
        notes=tuple(trials.notes),
    )


def search(
    trials: Trials, stages: Sequence[str], most: int, seed: int, load: Callable[[], LoadedModel]
) -> Found:
    """Find the best uniform setting with at most half of the `most` trials; climb with the rest."""
    uniform, best = best_uniform(trials, most // 2)
    rest = max(most - trials.accounts["uniform"].trials, 0)
    found, per_layer = climb(trials, best, stages, rest, seed, load)
    return Found(uniform, {"uniform": best, **found}, per_layer, trials.accounts)


def climb(
    trials: Trials,
    best: Tried,
    stages: Sequence[str],
    most: int,
    seed: int,
    load: Callable[[], LoadedModel],
) -> tuple[dict[str, Tried], Tried | None]:
    """Run the stages; return the best setting after each, and the best setting by layers.

    The best by layers is a baseline for the proof. It is searched once the heads are profiled.

    Args:
        trials: measures settings.
        best: the start.
        stages: names of STAGES, in order.
        most: trials of all stages together. Stages that end only with the trials share equally the
            trials and the time that are left.
        seed: for random draws, which only `tpe`, `structured` and `cma` make.
        load: loads the model once more, with gradients enabled; for `sensitivity` and `alphas`,
            which share one profile.
    """
    bests = {}
    start, per_layer = best, None
    way = Climb(trials, best)
    profile: sensitivity.Profile | None = None
    for number, name in enumerate(stages):
        sharing = sum(stage in OPEN for stage in stages[number:]) if name in OPEN else 1
        with trials.stage(name, most // sharing, 1 / sharing):
            match name:
                case "sensitivity" | "alphas":
                    profile = profile or sensitivity.look(trials, way.best.setting, load)
                    if profile is not None:
                        stage = sensitivity.deal if name == "sensitivity" else sensitivity.alphas
                        way.best = stage(trials, way.best, profile)
                case "tpe":
                    samplers.tpe(way, seed)
                case "structured":
                    samplers.structured(way, seed)
                case "cma":
                    samplers.cma(way, seed)
                case _:
                    getattr(way, name)()
        most -= trials.accounts[name].trials
        bests[name] = way.best
        if profile is not None and PER_LAYER not in trials.accounts:
            per_layer = _by_layer(trials, start, profile, most)
            most -= trials.accounts[PER_LAYER].trials
    return bests, per_layer


def _by_layer(
    trials: Trials, start: Tried, profile: sensitivity.Profile, most: int
) -> Tried | None:
    """Search the best setting by layers; None if neither trials nor time suffice for any."""
    with trials.stage(PER_LAYER, min(most, sensitivity.MOST_PROPOSALS + 1), RIVAL_SHARE):
        found = sensitivity.per_layer(trials, start, profile)
        whole = trials.left > 0
    count = trials.accounts[PER_LAYER].trials
    if whole:
        return found
    trials.notes.append(
        f"The best setting by layers is of {count} trial{'s' * (count > 1)}, cut short: more "
        "--trials or --minutes may make this baseline stronger."
        if count
        else "No setting by layers was measured: with more --trials or --minutes the table is "
        "compared with the best one."
    )
    return found if count else None


def _examples(
    model: LoadedModel, chosen: Sequence[datasets.Dataset], settings: Settings
) -> tuple[list[Example], list[Example]]:
    """Make sequences for the search and for the proof, equally many from each dataset, in turn."""
    wanted = {
        "examples": settings.examples,
        "holdout": settings.holdout or max(2 * settings.examples, 16),
    }
    made = {}
    for field, count in wanted.items():
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
        made[field] = [example for turn in turns for example in turn][:count]
    return made["examples"], made["holdout"]


def _check_budgets(model: LoadedModel, frame: Frame, examples: Sequence[Example]) -> None:
    probe = frame.policy(frame.uniform(UniformSetting(alpha=1.0, recent_share=0.0, sinks=0)))
    lengths = {len(example.token_ids) for example in examples}
    budgets = {length: objective.effective(probe, model, length).budget for length in lengths}
    shortest, longest = min(lengths), max(lengths)
    if budgets[shortest] < LEAST_BUDGET:
        raise InvalidArgument(
            "budget",
            f"{budgets[shortest]} tokens for the shortest example of {shortest} tokens; accepted: "
            f"at least {LEAST_BUDGET}",
        )
    if budgets[longest] >= longest:
        raise InvalidArgument(
            "budget",
            f"{budgets[longest]} tokens hold even the longest example of {longest} tokens whole, "
            "so that nothing would be evicted; lower the budget, or raise --length",
        )
