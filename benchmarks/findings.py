"""Measures the findings and the figures of the model's card again, from the shipped weights.

Owns the figures in `results/findings.json`, and the comparison with the stored figures.
`benchmarks.studies` has the studies, `benchmarks.findings_page` makes the tables between the pages'
markers, and `benchmarks.pictures` the pictures.

    python -m benchmarks.findings [--only STUDY]   # measure, write figures and tables
    python -m benchmarks.findings --check          # measure, compare with stored figures
    python -m benchmarks.findings --redraw         # draw the pictures from stored figures
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from a2sf import reference
from a2sf.schema import Estimate
from benchmarks import RESULTS
from benchmarks.findings_page import fill, render
from benchmarks.pictures import study_picture
from benchmarks.studies import STUDIES, Study
from tuner.evaluation import statistics
from tuner.evaluation.results import METRICS, Evaluation, Size

FIGURES = RESULTS / "findings.json"
PAGES = (Path(__file__).with_name("FINDINGS.md"), reference.path() / "README.md")

RELATIVE_TOLERANCE = 0.02
ABSOLUTE_TOLERANCE = 0.005
"""Tolerances of a mean: another processor or another number of threads rounds differently, and a
near-tie then evicts another token."""


def summary(found: Evaluation, study: Study) -> dict[str, Any]:
    """The stored part of a study: means with intervals, and the main comparisons."""

    def figure(value: Estimate | None) -> list[float] | None:
        return None if value is None else [round(x, 5) for x in (value.mean, value.low, value.high)]

    sizes = [Size(ratio=ratio) for ratio in study.ratios]
    return {
        "name": study.name,
        "question": study.question,
        "command": study.command,
        "seconds": found.seconds,
        "tasks": [task.model_dump(mode="json") for task in found.tasks],
        "cells": [
            {
                "task": cell.task,
                "policy": cell.policy,
                "ratio": cell.size.ratio if cell.size else None,
                "budget": round(cell.budget, 1),
                **{name: figure(getattr(cell, name)) for name in METRICS},
            }
            for cell in found.cells
        ],
        "comparisons": [
            {
                "task": c.task,
                "ratio": c.size.ratio,
                "policy": c.policy,
                "baseline": c.baseline,
                "kl": figure(c.difference),
                "p_holm": round(c.p_holm, 5),
            }
            for task in found.tasks
            for size in sizes
            for c in found.main_comparisons(task.name, size)
        ]
        + [
            contrast(found, task.name, size, *pair, figure)
            for task in found.tasks
            for size in sizes
            for pair in study.contrasts
        ],
    }


def contrast(
    found: Evaluation,
    task: str,
    size: Size,
    policy: str,
    baseline: str,
    figure: Callable[[Estimate], list[float] | None],
) -> dict[str, Any]:
    """One comparison that was chosen before the measurement: its p-value needs no correction."""
    ours, theirs = (found.cell(task, name, size) for name in (policy, baseline))
    assert ours is not None
    assert theirs is not None
    a, b = ours.by_example["kl"], theirs.by_example["kl"]
    (p,) = statistics.sign_flip_p([[x - y for x, y in zip(a, b, strict=True)]])
    return {
        "task": task,
        "ratio": size.ratio,
        "policy": policy,
        "baseline": baseline,
        "kl": figure(statistics.difference(a, b)),
        "p_holm": round(p, 5),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Describe means that changed by more than the tolerance, and missing cells."""
    found = []
    again = {(c["task"], c["policy"], c["ratio"]): c for c in after["cells"]}
    for cell in before["cells"]:
        key = (cell["task"], cell["policy"], cell["ratio"])
        other = again.get(key)
        for name in METRICS if other else ():
            if cell[name] is None:
                continue
            was, now = cell[name][0], other[name][0]  # type: ignore[index]
            if abs(now - was) > ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * abs(was):
                found.append(f"{before['name']}, {key}: {name} {was} is now {now}")
        if other is None:
            found.append(f"{before['name']}, {key}: not measured any more")
    return found


def main(
    only: Annotated[
        str | None, typer.Option(help="One study: " + ", ".join(s.name for s in STUDIES))
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare; write nothing.")] = False,
    redraw: Annotated[
        bool,
        typer.Option("--redraw", help="Draw the stored figures; measure nothing."),
    ] = False,
) -> None:
    """Measure the findings again."""
    if redraw:
        for known in json.loads(FIGURES.read_text())["studies"]:
            if len({cell["ratio"] for cell in known["cells"]} - {None}) > 1:
                FIGURES.with_name(f"{known['name']}.svg").write_text(study_picture(known))
        return
    moved: list[str] = []
    for study in STUDIES:
        if only not in (None, study.name):
            continue
        found = study.run()
        after = summary(found, study)
        typer.echo(f"{study.name}: {len(found.cells)} cells in {found.seconds:.0f} s")
        document = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"studies": []}
        studies = {known["name"]: known for known in document["studies"]}
        if check:
            moved += differences(studies[study.name], after)
            continue
        studies[study.name] = after
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": found.machine,
            "model": found.model.model_dump(mode="json"),
            "studies": [studies[s.name] for s in STUDIES if s.name in studies],
        }
        FIGURES.write_text(json.dumps(document, indent=1) + "\n")
        for page in PAGES:
            page.write_text(fill(page.read_text(), study.name, "\n\n".join(render(after))))
        if len(study.ratios) > 1:
            FIGURES.with_name(f"{study.name}.svg").write_text(study_picture(after))
    for line in moved:
        typer.echo(line)
    if moved:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
