"""Made-up evaluations, and a reader of the pages that are written of them and of tables."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html.parser import HTMLParser
from random import Random
from typing import Any

from a2sf.schema import Estimate
from tests.tables import IDENTITY, random_alpha
from tuner.evaluation.results import Cell, Comparison, Evaluation, Metric, Policy, Size, Task

ALPHAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
NAMES = ("full", "window", "h2o", "tova_per_head", "random", *(f"a2sf:{a:g}" for a in ALPHAS))
RATIOS = tuple(Size(ratio=ratio) for ratio in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8))
SLOTS = tuple(Size(slots=slots) for slots in (16, 32, 64))
VOID = {"meta", "br"}


def table(name: str = "mathqa") -> Policy:
    return Policy(
        name=name, description="an alpha table", alpha=random_alpha(IDENTITY), sha256="b" * 64
    )


def evaluation(
    *,
    names: Sequence[str] = ("full", "window", "h2o", "a2sf:0.5", "a2sf:0.9"),
    sizes: Sequence[Size] = RATIOS[:3],
    tasks: Sequence[str] = ("mathqa, 1-shot",),
    accuracy: bool = True,
    tables: Sequence[Policy] = (),
    **updates: Any,
) -> Evaluation:
    """A made-up document: the smaller the cache, the worse."""
    rng = Random(0)
    policies = (*(Policy(name=name, description=f"preset {name}") for name in names), *tables)
    cells = [
        cell(rng, task, place, policy, size, accuracy)
        for task in tasks
        for place, policy in enumerate(policies)
        for size in ([None] if policy.name == "full" else sizes)
    ]
    values: dict[str, Any] = {
        "created_at": datetime(2026, 3, 4, 15, 6, tzinfo=UTC),
        "tool_version": "0.1.0",
        "command": "evaluate --dataset mathqa --ratios .1,.2",
        "machine": {"processor": "Some Processor", "torch": "2.13.0"},
        "seconds": 754.0,
        "model": IDENTITY,
        "seed": 7,
        "confidence": 0.95,
        "tasks": tuple(provenance(task, accuracy) for task in tasks),
        "policies": policies,
        "cells": tuple(cells),
        "comparisons": tuple(comparisons(rng, cells)),
    }
    return Evaluation(**{**values, **updates})


def provenance(name: str, accuracy: bool) -> Task:
    return Task(
        name=name,
        dataset="mathqa",
        split="validation",
        shots=1,
        prefill_chunk=0,
        examples=61,
        tokens=12345,
        counted=6789,
        questions=62 if accuracy else 0,
        accuracy="likeliest choice" if accuracy else None,
        data_sha256="c" * 64,
    )


def cell(
    rng: Random, task: str, place: int, policy: Policy, size: Size | None, accuracy: bool
) -> Cell:
    share = 1.0 if size is None else size.ratio or (size.slots or 0) / 128
    loss = 0.0 if size is None else rng.uniform(0.8, 1.2) * math.exp(-4 * share) * (2 + place % 5)
    figures = {
        "kl": around(loss),
        "nll": around(1.2 + loss),
        "top1": around(math.exp(-loss)),
        "accuracy": around(0.2 + 0.3 * math.exp(-loss)) if accuracy else None,
        "similarity": around(math.exp(-loss / 3)),
    }
    heads = tuple(
        tuple(math.exp(-loss * rng.random()) for _ in range(IDENTITY.num_kv_heads))
        for _ in range(IDENTITY.num_layers)
    )
    return Cell(
        task=task,
        policy=policy.name,
        size=size,
        budget=128 * share,
        similarity_by_head=heads,
        by_example={},
        **figures,  # type: ignore[arg-type]
    )


def around(mean: float) -> Estimate:
    return Estimate(mean=mean, low=mean * 0.9, high=mean * 1.15)


def comparisons(rng: Random, cells: Sequence[Cell]) -> list[Comparison]:
    metrics: tuple[Metric, ...] = ("kl", "nll")
    return [
        compared(cell.task, cell.size, cell.policy, metric, rng.uniform(-1, 1), rng.random() ** 4)
        for cell in cells
        for metric in metrics
        if cell.size is not None and cell.policy != "h2o"
    ]


def compared(
    task: str, size: Size, policy: str, metric: Metric, mean: float, p: float
) -> Comparison:
    return Comparison(
        task=task,
        size=size,
        metric=metric,
        policy=policy,
        baseline="h2o",
        difference=Estimate(mean=mean, low=mean - 0.1, high=mean + 0.1),
        p=p,
        p_holm=min(1.0, 3 * p),
    )


class Page(HTMLParser):
    """Elements with their attributes, tables as rows of texts; raises where tags do not pair."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "caption":
            self.captions.append("")
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"th", "td"} & set(self._open):
            self.tables[-1][-1][-1] += data
        elif "caption" in self._open:
            self.captions[-1] += data

    def under(self, caption: str) -> list[list[str]]:
        (found,) = (t for t, c in zip(self.tables, self.captions, strict=True) if c == caption)
        return found

    def pictures(self) -> list[str]:
        return [str(a.get("aria-label")) for tag, a in self.elements if tag == "svg"]
