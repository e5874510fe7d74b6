"""Measures the findings and the figures of the model's card again, from the shipped weights.

Owns the studies, their figures in `results/findings.json`, and the comparison with the stored
figures. `benchmarks.findings_page` makes the tables between the pages' markers, and
`benchmarks.pictures` the pictures.

    python -m benchmarks.findings [--only STUDY]   # measure, write figures and tables
    python -m benchmarks.findings --check          # measure, compare with stored figures
    python -m benchmarks.findings --redraw         # draw the pictures from stored figures
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from a2sf import reference
from a2sf.schema import Estimate
from benchmarks import RESULTS
from benchmarks.findings_page import fill, render
from benchmarks.pictures import study_picture
from tuner.evaluate import Settings, evaluate
from tuner.evaluation import statistics
from tuner.evaluation.results import METRICS, Evaluation, Size

FIGURES = RESULTS / "findings.json"
PAGES = (Path(__file__).with_name("FINDINGS.md"), reference.path() / "README.md")

RELATIVE_TOLERANCE = 0.02
ABSOLUTE_TOLERANCE = 0.005
"""Tolerances of a mean: another processor or another number of threads rounds differently, and a
near-tie then evicts another token."""

OTHERS = "full,window,h2o,tova_per_head,random,random:0"
FEW = ",".join(
    f"a2sf:{alpha}:{recent}" for alpha in ("0", ".5", ".9", ".99", "1") for recent in ("0", ".5")
)
GRID = ",".join(
    f"a2sf:{alpha}:{recent}"
    for alpha in ("0", ".5", ".9", ".95", ".98", ".99", "1")
    for recent in ("0", ".5")
)


TABLES = ",".join(f"benchmarks/tables/{name}.json" for name in ("recall", "state"))
"""Fitted by `make tables`; the figures call each by its own name."""


@dataclass(frozen=True)
class Study:
    """One evaluation; `question` is the question it answers."""

    name: str
    question: str
    datasets: tuple[str, ...]
    policies: str
    ratios: tuple[float, ...]
    examples: int
    length: int = 512
    shots: tuple[int | None, ...] = (None,)
    contrasts: tuple[tuple[str, str], ...] = ()
    """Pairs of policies whose difference was chosen for a test before the measurement."""

    def run(self) -> Evaluation:
        """Measure it on the shipped model."""
        return evaluate(
            Settings(
                datasets=self.datasets,
                policies=self.policies,
                sizes=tuple(Size(ratio=ratio) for ratio in self.ratios),
                shots=self.shots,
                examples=self.examples,
                length=self.length,
                split="validation",
                prefill_chunk=None,
                seed=0,
                data_dir=None,
                model="reference",
                revision=None,
                device="cpu",
                dtype="float32",
                command=self.command,
            )
        )

    @property
    def command(self) -> str:
        """The equivalent command line."""
        shots = ",".join(str(n) for n in self.shots if n is not None)
        ratios = ",".join(f"{ratio:g}" for ratio in self.ratios)
        return (
            f"python -m tuner evaluate --dataset {','.join(self.datasets)} "
            f"--policies {self.policies} "
            + (f"--ratios {ratios} " if ratios else "")
            + (f"--shots {shots} " if shots else "")
            + f"--examples {self.examples} --length {self.length}"
        )


STUDIES = (
    Study(
        "card",
        "What can the model do with everything in view?",
        (
            *("recall", "recall_list", "recall_sentence", "recall_pair", "recall_story"),
            *("state", "state_value", "state_held", "state_counter", "arith", "copy"),
        ),
        "full",
        (),
        64,
    ),
    Study(
        "card-1024",
        "And at the end of its context?",
        ("recall", "recall_sentence", "recall_pair", "recall_story", "state", "arith"),
        "full",
        (),
        64,
        length=1024,
    ),
    Study(
        "ratios",
        "How does each policy fade as the budget shrinks?",
        ("recall",),
        "full,window,h2o,tova_per_head,random,a2sf:.99:0,a2sf:.9:.5,mathqa",
        (0.1, 0.2, 0.3, 0.4, 0.6, 0.8),
        32,
    ),
    Study(
        "recall",
        "What survives at a fifth, in a talk that returns to what it has asked for?",
        ("recall",),
        f"{OTHERS},{GRID},mathqa",
        (0.2,),
        64,
    ),
    Study(
        "tasks",
        "And on everything else?",
        (
            *("recall_story", "state", "arith", "mathqa", "gsm8k", "winogrande"),
            "wikitext2",
        ),
        f"{OTHERS},{FEW},mathqa",
        (0.2,),
        32,
    ),
    Study(
        "transfer",
        "What is a table worth on what it was not fitted to?",
        ("recall", "recall_story", "state", "arith", "mathqa", "wikitext2"),
        f"full,window,h2o,random,a2sf:.99:0,a2sf:0:0,a2sf:.9:.5,{TABLES},mathqa",
        (0.2,),
        32,
    ),
    Study(
        "transfer-budget",
        "What do tables keep at other budgets than the one that they were fitted at?",
        ("recall",),
        f"full,random,a2sf:.99:0,{TABLES}",
        (0.1, 0.15, 0.2, 0.3, 0.4),
        32,
    ),
    Study(
        "transfer-length",
        "And on sequences twice as long as those it was fitted to?",
        ("recall", "state"),
        f"full,random,a2sf:.99:0,a2sf:.995:0,a2sf:0:0,{TABLES}",
        (0.2,),
        32,
        length=1024,
    ),
    Study(
        "paper",
        "Does arithmetic want a high alpha and WinoGrande a low one, as the paper prunes?",
        ("mathqa", "winogrande"),
        "full,window:0,h2o:0,"
        + ",".join(f"a2sf:{a}:0:0" for a in ("0", ".1", ".3", ".5", ".7"))
        + ","
        + ",".join(f"a2sf:{a}:0:0" for a in (".9", ".95", ".98", ".99", "1")),
        (0.2,),
        96,
        length=256,
        shots=(0, 1),
        contrasts=(("a2sf:.9:0:0", "a2sf:.1:0:0"),),
    ),
)


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
            for c in found.decisive(task.name, size)
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
    """One comparison that was named beforehand, so that its p-value needs no correction."""
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
        typer.Option("--redraw", help="Draw the pictures of what is written; measure nothing."),
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
