"""The cells of an evaluation: the figures collected in each, and comparisons between cells.

Owns how figures of single examples become estimates, and which policies are compared. Knows nothing
of how figures are measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tuner.data.packing import Item
from tuner.evaluation import statistics
from tuner.evaluation.policy_specs import PolicySpec
from tuner.evaluation.results import Cell, Comparison, Metric, Size, Task


@dataclass
class CellFigures:
    """The figures of one cell, one entry per example."""

    budget: list[int] = field(default_factory=list)
    figures: dict[Metric, list[float]] = field(default_factory=dict)
    similarity: list[Tensor] = field(default_factory=list)

    def add(self, name: Metric, value: float) -> None:
        """Add a figure of the next example."""
        self.figures.setdefault(name, []).append(value)


@dataclass(frozen=True)
class TaskPlan:
    """One task with all policies and sizes to run on it."""

    task: Task
    items: list[Item]
    cells: dict[tuple[PolicySpec, Size | None], CellFigures]


def make_cell(
    task: Task, policy: PolicySpec, size: Size | None, collected: CellFigures, seed: int
) -> Cell:
    """Make a cell from the collected figures."""
    estimates = {
        name: statistics.estimate(values, seed=seed) for name, values in collected.figures.items()
    }
    by_head = torch.stack(collected.similarity).mean(dim=0)
    return Cell(
        task=task.name,
        policy=policy.name,
        size=size,
        budget=sum(collected.budget) / len(collected.budget),
        kl=estimates["kl"],
        nll=estimates["nll"],
        top1=estimates["top1"],
        accuracy=estimates.get("accuracy"),
        similarity=estimates["similarity"],
        similarity_by_head=tuple(tuple(row) for row in by_head.tolist()),
        by_example={name: tuple(values) for name, values in collected.figures.items()},
    )


def compare(plan: TaskPlan, size: Size, seed: int) -> Iterator[Comparison]:
    """Compare each forgetting policy with the other methods, and each table with all policies."""
    sized = {policy: cell for (policy, at), cell in plan.cells.items() if at == size}
    pairs = [
        (ours, theirs)
        for ours in sized
        for theirs in sized
        if (ours.table and not theirs.table)
        or (
            ours.requested_policy.alpha is not None
            and ours.slot_rule is None
            and theirs.requested_policy.preset is not None
        )
    ]
    for metric in ("kl", "accuracy") if plan.task.accuracy else ("kl",):
        figures = [
            (sized[ours].figures[metric], sized[theirs].figures[metric]) for ours, theirs in pairs
        ]
        if not figures:
            return
        gaps = [[a - b for a, b in zip(*both, strict=True)] for both in figures]
        p_values = statistics.sign_flip_p(gaps, seed=seed)
        corrected = statistics.holm(p_values)
        for (ours, theirs), both, p, p_holm in zip(
            pairs, figures, p_values, corrected, strict=True
        ):
            yield Comparison(
                task=plan.task.name,
                size=size,
                metric=metric,
                policy=ours.name,
                baseline=theirs.name,
                difference=statistics.difference(*both, seed=seed),
                p=p,
                p_holm=p_holm,
            )
