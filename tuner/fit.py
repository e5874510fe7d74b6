"""One fit, from a dataset's name to a sealed table.

Owns the order of the stages (uniform settings, tables, proof on held-out examples) and the verdict.
Knows nothing of command lines or printing; progress goes to standard error as bars.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import optuna
from tqdm import tqdm

from a2sf import __version__
from a2sf.errors import InvalidArgument
from a2sf.models import LoadedModel, load_model
from a2sf.policy import CachePolicy
from a2sf.schema import AlphaTable, Calibration, Estimate, Evidence, Search, UniformSetting, seal
from a2sf.teacher import Example
from tuner import datasets, objective, packing, statistics
from tuner.objective import Candidate, Cost, Objective
from tuner.search import Frame, Uniform, best_uniform, ladder
from tuner.study import Fit, open_storage

LEAST_BUDGET = 8
"""Slots: room for the four sinks that the grid and the presets protect, and a few that compete."""

COMPARED_PRESETS = ("h2o", "window", "tova_per_head", "random")

EDITION = 1
"""Raised when the search changes so that trials of an earlier one no longer compare."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for. Exactly one of `budget` (tokens) and `budget_ratio` is set."""

    dataset: str
    out: Path
    name: str
    study: str
    model: str
    revision: str | None
    budget: int | None
    budget_ratio: float | None
    prefill_chunk: int
    data_dir: Path | None
    trials: int
    examples: int
    holdout: int | None
    """Held-out examples; None: twice `examples` and at least 16, or as many as there are."""
    length: int
    seed: int
    storage: str | None
    device: str
    dtype: str
    keep_table: bool


@dataclass(frozen=True)
class Outcome:
    """The sealed table, with what the file has no field for."""

    table: AlphaTable
    uniform: Uniform
    full_nll: Estimate
    """Nats a token on the held-out examples, with the full cache."""
    nll: dict[str, Estimate]
    """The same under the fitted `table` and under each baseline."""


def fit(settings: Settings) -> Outcome:
    """Search, prove and seal. Raises A2SFError for whatever the user can mend."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dataset = datasets.load(settings.dataset, datasets.data_directory(settings.data_dir))
    model = load_model(
        settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype
    )
    calibration, held_out = _examples(model, dataset, settings)
    frame = Frame(
        num_layers=model.shape.num_layers,
        num_kv_heads=model.shape.num_kv_heads,
        budget=settings.budget,
        budget_ratio=settings.budget_ratio,
        prefill_chunk=settings.prefill_chunk,
    )
    _check_budgets(model, frame, [*calibration, *held_out])
    data_sha256 = packing.digest(calibration)
    storage, storage_kind = open_storage(settings.storage, settings.out.with_suffix(".journal"))
    study = Fit(
        storage,
        settings.study,
        frame,
        {
            "model": model.identity.fingerprint,
            "dtype": str(model.dtype),
            "budget": settings.budget,
            "budget_ratio": settings.budget_ratio,
            "prefill_chunk": settings.prefill_chunk,
            "seed": settings.seed,
            "dataset": dataset.name,
            "examples": len(calibration),
            "length": settings.length,
            "data_sha256": data_sha256,
            "edition": EDITION,
        },
    )
    uniform = _search(study, Objective(model, calibration, label="calibration"), settings.trials)
    best = study.best()[0] if study.finished else frame.uniform(uniform).alpha
    fitted = frame.table(best, recent_share=uniform.recent_share, sinks=uniform.sinks)
    proof = Objective(model, held_out, label="held out")
    costs = _prove(proof, {"table": fitted, **baselines(frame, uniform, settings.seed)})
    evidence = judge(costs, uniform, dataset.name, dataset.validation.split, settings.seed)
    wins = evidence.verdict == "better" or settings.keep_table
    table = seal(
        name=settings.name,
        model=model.identity,
        policy=fitted if wins else frame.uniform(uniform),
        calibration=Calibration(
            dataset=dataset.name,
            split=dataset.calibration.split,
            examples=len(calibration),
            tokens=sum(len(example.token_ids) for example in calibration),
            data_sha256=data_sha256,
            seed=settings.seed,
        ),
        evidence=evidence,
        search=Search(
            sampler=study.sampler,
            trials=study.finished,
            study=study.name,
            storage=storage_kind,
            wall_seconds=round(study.seconds, 1),
            stages=(),
        ),
        created_at=datetime.now(UTC).replace(microsecond=0),
        tool_version=__version__,
    )
    return Outcome(
        table=table,
        uniform=uniform,
        full_nll=statistics.estimate(proof.full_nll, seed=settings.seed),
        nll={
            name: statistics.estimate(cost.nll, seed=settings.seed) for name, cost in costs.items()
        },
    )


def baselines(frame: Frame, uniform: Uniform, seed: int) -> dict[str, Candidate]:
    """What the table is compared with, at its budget: the bar to beat, and the known methods.

    The presets protect what they always protect; random protects what the best uniform setting
    does, so that it shows what the score adds to the protection.
    """
    base = CachePolicy(
        budget=frame.budget, budget_ratio=frame.budget_ratio, prefill_chunk=frame.prefill_chunk
    )
    presets = {name: base.model_copy(update={"preset": name}) for name in COMPARED_PRESETS}
    protected = {"recent_share": uniform.recent_share, "sinks": uniform.sinks}
    presets["random"] = presets["random"].model_copy(update={**protected, "random_seed": seed})
    return {"uniform": frame.uniform(uniform), **presets}


def judge(
    costs: dict[str, Cost], uniform: Uniform, dataset: str, split: str, seed: int
) -> Evidence:
    """Turn held-out costs (`table`, `uniform` and further baselines) into figures and a verdict.

    Better means that the whole paired interval of table minus uniform lies below 0.
    """
    ours = costs["table"].kl
    others = {name: cost.kl for name, cost in costs.items() if name != "table"}
    paired = {name: statistics.difference(ours, kl, seed=seed) for name, kl in others.items()}
    p_values = statistics.sign_flip_p([ours - kl for kl in others.values()], seed=seed)
    return Evidence(
        objective=objective.DESCRIPTION,
        dataset=dataset,
        split=split,
        examples=len(ours),
        confidence=statistics.CONFIDENCE,
        table=statistics.estimate(ours, seed=seed),
        baselines={name: statistics.estimate(kl, seed=seed) for name, kl in others.items()},
        paired=paired,
        p_holm=dict(zip(others, statistics.holm(p_values), strict=True)),
        uniform=UniformSetting(**vars(uniform)),
        verdict="better" if paired["uniform"].high < 0 else "no_better_than_uniform",
    )


def _examples(
    model: LoadedModel, dataset: datasets.Dataset, settings: Settings
) -> tuple[list[Example], list[Example]]:
    wanted = {
        "examples": settings.examples,
        "holdout": settings.holdout or max(2 * settings.examples, 16),
    }
    parts = {"examples": dataset.calibration, "holdout": dataset.validation}
    made = {}
    for field, part in parts.items():
        made[field] = packing.examples(
            model, part, count=wanted[field], length=settings.length, seed=settings.seed
        )
        enough = 2 if field == "holdout" and settings.holdout is None else wanted[field]
        if len(made[field]) < enough:
            raise InvalidArgument(
                field,
                f"{enough} sequences of about {settings.length} tokens, and {part.split} of "
                f"{dataset.name} gives {len(made[field])}; lower --{field} or --length",
            )
    return made["examples"], made["holdout"]


def _check_budgets(model: LoadedModel, frame: Frame, examples: Sequence[Example]) -> None:
    probe = frame.uniform(Uniform(alpha=1.0, recent_share=0.0, sinks=0))
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


def _search(study: Fit, calibration: Objective, trials: int) -> Uniform:
    kept = study.uniform
    if kept is None:
        setting, cost = _stage_one(study, calibration, trials)
        study.settle(setting, cost)
        kept = (setting, cost)
    study.run(trials, len(calibration.examples), calibration.cost)
    return kept[0]


def _stage_one(study: Fit, calibration: Objective, trials: int) -> tuple[Uniform, Cost]:
    grid, rungs = ladder(len(calibration.examples), trials)
    total = sum(rung.settings for rung in rungs) + 2
    with tqdm(total=total, desc="uniform", unit="setting", leave=False) as bar:

        def measure(settings: Sequence[Uniform], examples: int) -> Iterator[Cost]:
            def fresh(new: Sequence[Uniform]) -> Iterable[Cost]:
                tables = [study.frame.uniform(setting) for setting in new]
                return calibration.costs(tables, range(examples))

            best = float("inf")
            for cost in study.measured(settings, examples, fresh):
                best = min(best, cost.mean)
                bar.update()
                bar.set_postfix_str(f"best {best:.4f} nats on {examples} examples")
                yield cost

        return best_uniform(grid, rungs, measure)


def _prove(held_out: Objective, candidates: dict[str, Candidate]) -> dict[str, Cost]:
    costs = held_out.costs(list(candidates.values()))
    bar = tqdm(costs, total=len(candidates), desc="held out", unit="policy", leave=False)
    return dict(zip(candidates, bar, strict=True))
