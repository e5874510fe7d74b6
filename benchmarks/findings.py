"""Measure again what the findings and the model's card say, from the shipped weights.

Owns the studies, their figures in `results/findings.json`, and the tables of `FINDINGS.md` and of
the card, which are rewritten between their markers; the words around them are written by hand.

    python -m benchmarks.findings [--only STUDY]   # measure, write figures and tables
    python -m benchmarks.findings --check          # measure, compare with what is written
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from a2sf import reference
from a2sf.schema import Estimate
from tuner import statistics
from tuner.evaluate import Settings, evaluate
from tuner.pictures import curves
from tuner.results import METRICS, Evaluation, Metric, Size

HERE = Path(__file__).parent
FIGURES = HERE / "results" / "findings.json"
PAGES = (HERE / "FINDINGS.md", reference.path() / "README.md")

RELATIVE_TOLERANCE = 0.02
ABSOLUTE_TOLERANCE = 0.005
"""How far a mean may be from what is written: another processor or another number of threads
rounds otherwise, and a near-tie then evicts another token."""

OTHERS = "full,window,h2o,tova_per_head,random,random:0"
FEW = ",".join(
    f"a2sf:{alpha}:{recent}" for alpha in ("0", ".5", ".9", ".99", "1") for recent in ("0", ".5")
)
GRID = ",".join(
    f"a2sf:{alpha}:{recent}"
    for alpha in ("0", ".5", ".9", ".95", ".98", ".99", "1")
    for recent in ("0", ".5")
)


@dataclass(frozen=True)
class Study:
    """One evaluation; `question` is what it answers."""

    name: str
    question: str
    datasets: tuple[str, ...]
    policies: str
    ratios: tuple[float, ...]
    examples: int
    length: int = 512
    shots: tuple[int | None, ...] = (None,)
    contrasts: tuple[tuple[str, str], ...] = ()
    """Pairs of policies whose difference is asked for before looking."""

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
        """The same by hand."""
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
    """What is kept of a study: means with intervals, and the comparisons that decide."""

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
    """Means that have moved by more than the tolerance, and cells that are gone."""
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


def render(study: dict[str, Any]) -> Iterable[str]:
    """The study's paragraphs and tables in Markdown."""
    yield f"`{study['command']}`"
    if len({cell["ratio"] for cell in study["cells"]} - {None}) > 1:
        for metric in ("kl", "accuracy"):
            yield _by_ratio(study, metric)
    elif {cell["policy"] for cell in study["cells"]} == {"full"}:
        yield _card(study)
    else:
        for task in study["tasks"]:
            yield _by_policy(study, task)


def _card(study: dict[str, Any]) -> str:
    lines = ["| task | questions | right | NLL of the answers |", "|---|---|---|---|"]
    for task, cell in zip(study["tasks"], study["cells"], strict=True):
        lines.append(
            f"| {task['name']} | {task['questions']} | {_shown(cell['accuracy'], 'accuracy')} "
            f"| {_shown(cell['nll'], 'nll')} |"
        )
    return "\n".join(lines)


def _by_ratio(study: dict[str, Any], metric: Metric) -> str:
    ratios = sorted({cell["ratio"] for cell in study["cells"]} - {None})
    lines = [
        f"{METRICS[metric]}:",
        "",
        "| policy | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
        "|---|" + "---|" * len(ratios),
    ]
    for policy in dict.fromkeys(cell["policy"] for cell in study["cells"]):
        mine = {c["ratio"]: c[metric] for c in study["cells"] if c["policy"] == policy}
        shown = (_shown(mine.get(ratio, mine.get(None)), metric) for ratio in ratios)
        lines.append(f"| {policy} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _by_policy(study: dict[str, Any], task: dict[str, Any]) -> str:
    cells = [cell for cell in study["cells"] if cell["task"] == task["name"]]
    cells.sort(key=lambda cell: cell["kl"][0])
    names: list[Metric] = ["kl", "top1", "accuracy", "similarity"]
    if task["accuracy"] is None:
        names.remove("accuracy")
    lines = [
        f"**{task['name']}** ({task['examples']} examples, {task['counted']} positions"
        + (f", {task['questions']} questions" if task["questions"] else "")
        + (f", blocks of {task['prefill_chunk']}" if task["prefill_chunk"] else "")
        + ")",
        "",
        "| policy | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for cell in cells:
        shown = (_shown(cell[name], name) for name in names)
        lines.append(f"| {cell['policy']} | " + " | ".join(shown) + " |")
    pairs = [c for c in study["comparisons"] if c["task"] == task["name"]]
    if pairs:
        lines += ["", "| KL difference | mean | p, corrected |", "|---|---|---|"]
        lines += [
            f"| {c['policy']} - {c['baseline']} | {_shown(c['kl'], 'kl', sign=True)} "
            f"| {c['p_holm']:.2g} |"
            for c in pairs
        ]
    return "\n".join(lines)


def _shown(value: Sequence[float] | None, metric: Metric, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    if metric == "accuracy":
        return f"{value[0]:.1%} [{value[1]:.1%}, {value[2]:.1%}]"
    form = "+.3f" if sign else ".3f"
    # Rounded before it is shown, and never a negative zero.
    mean, low, high = (round(x, 3) + 0.0 for x in value)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def fill(page: str, name: str, block: str) -> str:
    """The page with the block between the markers of its name, if it has them."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    return f"{before}{begin}\n{block}\n{end}{after}" if found else page


def standalone(picture: str) -> str:
    """An SVG file of a picture that was made for a page: with its namespace, on white."""
    element, rest = picture.split(">", 1)
    return (
        f'{element} xmlns="http://www.w3.org/2000/svg">'
        f'<rect width="100%" height="100%" fill="white"/>{rest}'
    )


def main(
    only: Annotated[
        str | None, typer.Option(help="One study: " + ", ".join(s.name for s in STUDIES))
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare; write nothing.")] = False,
) -> None:
    """Measure the findings again."""
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
            task = study.datasets[0]
            sizes = [Size(ratio=ratio) for ratio in study.ratios]
            picture = curves(found, task, sizes, label=study.question, salt=study.name)
            FIGURES.with_name(f"{study.name}.svg").write_text(standalone(picture) + "\n")
    for line in moved:
        typer.echo(line)
    if moved:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
