"""The findings page: in step with its figures, and the figures with the shipped weights."""

import dataclasses
import json
from pathlib import Path

import pytest

from a2sf.model.loader import LoadedModel
from benchmarks.findings import FIGURES, PAGES, differences, summary
from benchmarks.findings_page import fill, render
from benchmarks.studies import STUDIES

KNOWN = json.loads(FIGURES.read_text(encoding="utf-8"))


def test_the_figures_are_of_the_shipped_weights(reference_model: LoadedModel) -> None:
    assert KNOWN["model"]["fingerprint"] == reference_model.identity.fingerprint
    assert [study["name"] for study in KNOWN["studies"]] == [study.name for study in STUDIES]
    for study, known in zip(STUDIES, KNOWN["studies"], strict=True):
        assert known["command"] == study.command


@pytest.mark.parametrize("known", KNOWN["studies"], ids=lambda known: known["name"])
def test_the_pages_show_the_figures(known: dict[str, object]) -> None:
    block = "\n\n".join(render(known))
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    assert sum(block in page for page in pages) == 1
    for page in pages:
        assert fill(page, str(known["name"]), block) == page


def test_the_model_recalls_as_the_findings_must_be_able_to_assume() -> None:
    card = {cell["task"]: cell["accuracy"][0] for cell in KNOWN["studies"][0]["cells"]}
    assert card["recall"] >= 0.9
    # Guessing: a thirtieth of the values and less; for sums one in twenty.
    assert min(card["state"], card["arith"]) >= 0.4


def test_a_figure_beyond_the_tolerance_and_a_missing_cell_are_reported() -> None:
    known = KNOWN["studies"][0]
    cell = known["cells"][0]
    assert differences(known, known) == []
    moved = {**cell, "nll": [cell["nll"][0] * 1.03 + 0.006, 0, 0]}
    (line,) = differences(known, {"cells": [moved, *known["cells"][1:]]})
    assert line.startswith("card, ('recall', 'full', None): nll")
    (line,) = differences(known, {"cells": known["cells"][1:]})
    assert "not measured any more" in line


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_recall_at_a_fifth_is_measured_again(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A2SF_DATA_DIR", str(data_dir))
    whole = next(study for study in STUDIES if study.name == "recall")
    known = next(study for study in KNOWN["studies"] if study["name"] == "recall")
    chosen = ("full", "h2o", "random", "a2sf:.99:0", "mathqa")
    found = dataclasses.replace(whole, policies=",".join(chosen))
    cells = [cell for cell in known["cells"] if cell["policy"] in chosen]
    assert len(cells) == len(chosen)
    assert differences({**known, "cells": cells}, summary(found.run(), found)) == []


def test_the_best_a2sf_beats_window_h2o_and_random_on_recall() -> None:
    known = next(study for study in KNOWN["studies"] if study["name"] == "recall")
    decided = {c["baseline"]: c for c in known["comparisons"] if c["policy"].startswith("a2sf:")}
    for baseline in ("window", "h2o", "random", "random:0"):
        assert decided[baseline]["kl"][2] < 0
        assert decided[baseline]["p_holm"] < 0.05
