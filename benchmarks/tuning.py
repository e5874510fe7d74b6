"""Compares the ways of searching at the same number of trials.

Owns one comparison. From the same best uniform setting, on the same calibration examples, each plan
of stages gets the same number of trials, and its result is measured on the same held-out examples.
Repeated over seeds, which determine the examples and the random draws of a plan.

    python -m benchmarks.tuning [--dataset recall] [--trials 100] [--seeds 5] [--out FILE]
"""

import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import optuna
import torch
import typer
from optuna.storages import InMemoryStorage

from a2sf.model.loader import load_model
from benchmarks import RESULTS, save
from tuner.data import datasets, packing
from tuner.evaluation.objective import Objective
from tuner.search.space import FitSpec
from tuner.search.stages import run_stages
from tuner.search.trials import Trials
from tuner.search.uniform import best_uniform
from tuner.settings import DEFAULT_STAGES
from tuner.study.ledger import Ledger

PLANS: dict[str, tuple[str, ...]] = {
    "tpe": ("tpe",),
    "alphas": ("layers", "heads", "protection", "polish"),
    "slots": ("slots",),
    "climb": ("slots", "layers", "heads", "protection", "polish"),
    "default": DEFAULT_STAGES,
    "sensitivity": ("sensitivity", "alphas"),
    "cma": ("cma",),
}
"""The plans to compare: Optuna's TPE over all heads; the coordinate stages for alphas alone, for
slots alone, and for both; the tuner's default, and its profile alone; and CMA-ES over layers."""


@dataclass(frozen=True)
class Row:
    """The result of one plan with one seed; costs are mean KL in nats."""

    seed: int
    plan: str
    calibration: float
    held_out: float
    held_out_uniform: float
    trials: int
    evaluations: float
    """Passes over all calibration examples through all layers."""
    seconds: float


def _trials(seen: Objective, spec: FitSpec) -> Trials:
    return Trials(Ledger(InMemoryStorage(), "tuning", {}), seen, spec)


def main(
    dataset: Annotated[str, typer.Option(help="As for a fit.")] = "recall",
    plans: Annotated[str, typer.Option(help="Plans, with commas between them.")] = ",".join(PLANS),
    trials: Annotated[
        int, typer.Option(help="Trials of each plan, without the uniform stage.")
    ] = 100,
    examples: Annotated[int, typer.Option(help="Calibration sequences.")] = 8,
    holdout: Annotated[int, typer.Option(help="Held-out sequences.")] = 64,
    length: Annotated[int, typer.Option(help="Largest number of tokens of a sequence.")] = 512,
    ratio: Annotated[float, typer.Option(help="Budget as a share of the length.")] = 0.2,
    seeds: Annotated[int, typer.Option(help="Repetitions.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = os.cpu_count() or 1,
    out: Annotated[Path | None, typer.Option(help="File of the JSON.")] = None,
) -> None:
    """Compare ways of searching, and write the figures."""
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chosen = {name: PLANS[name] for name in plans.split(",")}
    model = load_model("reference", device="cpu")
    data = datasets.load(dataset, datasets.data_directory(None))
    shape = model.shape
    spec = FitSpec(shape.num_layers, shape.num_kv_heads, None, ratio, 0)
    make = partial(packing.examples, model, length=length)
    unseen = Objective(model, make(data.validation, count=holdout, seed=0), label="held out")
    rows: list[Row] = []
    for seed in range(seeds):
        seen = Objective(
            model, make(data.calibration, count=examples, seed=seed), label="calibration"
        )
        _, uniform = best_uniform(_trials(seen, spec), trials)
        bar = unseen.cost(spec.policy(uniform.setting)).mean
        for name, stages in chosen.items():
            plan = _trials(seen, spec)
            bests, _ = run_stages(plan, uniform, stages, trials, seed)
            best = list(bests.values())[-1]
            stage_totals = [plan.stage_totals[stage] for stage in stages]
            rows.append(
                Row(
                    seed=seed,
                    plan=name,
                    calibration=round(best.mean, 4),
                    held_out=round(unseen.cost(spec.policy(best.setting)).mean, 4),
                    held_out_uniform=round(bar, 4),
                    trials=sum(totals.trials for totals in stage_totals),
                    evaluations=round(sum(totals.evaluations for totals in stage_totals), 1),
                    seconds=round(sum(totals.seconds for totals in stage_totals), 1),
                )
            )
            typer.echo(rows[-1])
    summary = {}
    for name in chosen:
        costs = [row.held_out for row in rows if row.plan == name]
        low, median, high = np.percentile(costs, [0, 50, 100]).round(4).tolist()
        summary[name] = {"median": median, "range": [low, high]}
        typer.echo(f"{name:12s} median {median:.4f} nats [{low:.4f}, {high:.4f}]")
    save(
        out or RESULTS / f"tuning-{dataset}.json",
        model,
        model=model.identity.id,
        dataset=dataset,
        trials=trials,
        examples=examples,
        holdout=holdout,
        length=length,
        budget_ratio=ratio,
        held_out_nats=summary,
        rows=[asdict(row) for row in rows],
    )


if __name__ == "__main__":
    typer.run(main)
