"""Stores the grid's figures: cells, their statistics, and which entries are missing.

A cell is a model, dtype, context and batch, and has an entry for each variant (and budget, if the
variant has one). Knows nothing of how a figure is measured or shown.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from .variants import BASE

Key = tuple[str, str, int, int]
Row = tuple[str, int | None]


def summarise(turns: list[list[float]], batch: int) -> dict[str, Any]:
    """Summarise a variant's turns of step times in ms.

    The time of a step is the mean of its turn, so that work that occurs once per turn is included.
    Median and quartiles are over the turns; those of single steps are stored as well.
    """
    means = [statistics.fmean(turn) for turn in turns]
    steps = [time for turn in turns for time in turn]
    median = statistics.median(means)
    return {
        "ms_per_step": round(median, 4),
        "ms_per_step_quartiles": quartiles(means),
        "ms_single_step_median": round(statistics.median(steps), 4),
        "ms_single_step_quartiles": quartiles(steps),
        "tokens_per_s": round(batch / median * 1e3, 2),
        "turn_means_ms": [round(mean, 4) for mean in means],
    }


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile, by linear interpolation."""
    if len(values) == 1:
        return [round(values[0], 4)] * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(low, 4), round(high, 4)]


def compare(entries: list[dict[str, Any]]) -> None:
    """Add to each measured entry of a cell how many times faster than transformers it is."""
    base = next((e for e in entries if e["variant"] == BASE and "ms_per_step" in e), None)
    for entry in entries:
        if base is not None and "ms_per_step" in entry:
            ratio = base["ms_per_step"] / entry["ms_per_step"]
            entry["times_faster_than_transformers"] = round(ratio, 3)


class Results:
    """The document, written completely after every cell."""

    def __init__(self, path: Path, head: dict[str, Any], *, resume: bool) -> None:
        self._path = path
        self.document: dict[str, Any] = {**head, "versions": {}, "cells": []}
        if resume and path.exists():
            known = json.loads(path.read_text())
            for field in ("machine", "settings"):
                if known[field] != head[field]:
                    raise ValueError(
                        f"{path} was measured with another {field}: {known[field]}, and now it "
                        f"would be {head[field]}; give --out another file, or leave --resume out"
                    )
            self.document = known

    def missing(self, key: Key, rows: list[Row]) -> bool:
        """Whether any of these entries of a cell is missing."""
        cell = self._find(key)
        have = {(e["variant"], e["budget"]) for e in cell["entries"]} if cell else set()
        return not set(rows) <= have

    def put(self, key: Key, about: dict[str, Any], entries: list[dict[str, Any]]) -> None:
        """Add or replace a cell, and write.

        All entries of one cell are from one run, because entries of an earlier run are not
        comparable.
        """
        compare(entries)
        model, dtype, context, batch = key
        cell = {
            "model": model,
            "dtype": dtype,
            "context": context,
            "batch": batch,
            **about,
            "entries": entries,
        }
        old = self._find(key)
        if old is None:
            self.document["cells"].append(cell)
        else:
            self.document["cells"][self.document["cells"].index(old)] = cell
        self.write()

    def write(self) -> None:
        """Replace the file atomically."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(self._path.name + ".draft")
        draft.write_text(json.dumps(self.document, indent=1) + "\n")
        draft.replace(self._path)

    def _find(self, key: Key) -> dict[str, Any] | None:
        cells: list[dict[str, Any]] = self.document["cells"]
        return next(
            (c for c in cells if (c["model"], c["dtype"], c["context"], c["batch"]) == key), None
        )
