"""The grid's arithmetic, its cells with a fake peer, what it resumes, and the page made of it."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from benchmarks.grid import parts, rows_of
from benchmarks.peers import environments, models, page
from benchmarks.peers.bench import Bench
from benchmarks.peers.models import Shape
from benchmarks.peers.results import Results, compare, quartiles, summarise
from benchmarks.peers.variants import VARIANTS, predicted_ms
from tests.benchmarks import fake_worker

SHAPE = Shape(
    layers=2,
    hidden=8,
    intermediate=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    vocabulary=10,
    max_context=100,
)
HEAD: dict[str, Any] = {
    "date": "2026-01-01",
    "machine": {"processor": "p", "cores": 2},
    "settings": {"rounds": 2, "steps": 4, "untimed": 1, "threads": 2},
    "left_out": [],
}


def measured(variant: str, budget: int | None, ms: float, batch: int = 1) -> dict[str, Any]:
    return {
        "variant": variant,
        "budget": budget,
        "status": "measured",
        "prefill_s": 0.5,
        "kv_bytes": 1,
        "kv_tokens": 10.0,
        "predicted_ms": 1.0,
        **summarise([[ms, ms], [ms, ms]], batch),
    }


def test_a_step_moves_the_weights_once_and_each_rows_kv_in_its_passes() -> None:
    # Attention 2 * 8 * 4 * (4 + 2), MLP 3 * 8 * 16, norms 2 * 8, a layer; a norm; the output.
    weights = 2 * (384 + 384 + 16) + 8 + 80
    assert SHAPE.weights_read == weights
    token = 2 * 2 * 2 * 4 * 4
    assert SHAPE.token_bytes("float32") == token
    assert SHAPE.token_bytes("bfloat16") == token // 2
    cell: dict[str, Any] = {"dtype": "float32", "context": 50, "batch": 3}
    moved = {
        name: VARIANTS[name].step_bytes(SHAPE, budget=budget, **cell) - 4 * weights
        for name, budget in (("dynamic", None), ("full", None), ("a2sf", 20), ("a2sf", 80))
    }
    assert moved["dynamic"] == 3 * 50 * 3 * token
    assert moved["full"] == 3 * 50 * (token + 2 * 2 * 8)
    # A row never holds more than its context.
    assert moved["a2sf"] == moved["full"]
    assert VARIANTS["a2sf"].step_bytes(SHAPE, budget=20, **cell) == 4 * weights + 3 * 20 * (
        token + 32
    )
    assert predicted_ms(5_000_000, 1e9) == 5.0


def test_the_weights_read_are_those_of_the_real_model() -> None:
    directory = models.prepare("reference", Path())
    # Its output matrix is its embedding, so that nothing is left out.
    with safe_open(directory / "model.safetensors", "numpy") as file:
        every = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert Shape.read(directory).weights_read == every


def test_the_mean_of_a_turn_includes_work_that_is_done_once_per_turn() -> None:
    figures = summarise([[1.0, 1.0, 4.0], [1.0, 1.0, 10.0], [1.0, 1.0, 4.0]], 4)
    assert figures["ms_per_step"] == 2.0
    assert figures["ms_single_step_median"] == 1.0
    assert figures["tokens_per_s"] == 2000.0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]
    assert quartiles([3.0]) == [3.0, 3.0]


def test_ratios_are_against_transformers_of_the_same_cell() -> None:
    entries = [measured("a2sf", 8, 2.0), measured("dynamic", None, 8.0)]
    compare(entries)
    assert [e["times_faster_than_transformers"] for e in entries] == [4.0, 1.0]
    alone = [measured("a2sf", 8, 2.0)]
    compare(alone)
    assert "times_faster_than_transformers" not in alone[0]


def test_variants_that_keep_all_are_measured_once_a_cell() -> None:
    assert rows_of(["a2sf", "full"], [128, 512]) == [("a2sf", 128), ("a2sf", 512), ("full", None)]
    assert list(parts(["reference", "random"], None)) == [
        ("reference", "float32"),
        ("random", "float32"),
        ("random", "bfloat16"),
    ]


def test_an_interrupted_run_keeps_its_results(tmp_path: Path) -> None:
    out = tmp_path / "grid.json"
    key = ("random-12", "float32", 512, 4)
    first = Results(out, HEAD, resume=True)
    assert first.missing(key, [("a2sf", 8)])
    first.put(key, {"date": "2026-01-01"}, [measured("a2sf", 8, 2.0, 4)])
    again = Results(out, {**HEAD, "date": "2026-01-02"}, resume=True)
    assert not again.missing(key, [("a2sf", 8)])
    assert again.missing(key, [("a2sf", 8), ("full", None)])
    assert again.missing((*key[:3], 16), [("a2sf", 8)])
    again.put(key, {"date": "2026-01-02"}, [measured("full", None, 3.0, 4)])
    assert len(again.document["cells"]) == 1
    assert Results(out, HEAD, resume=False).missing(key, [("full", None)])
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]


def test_figures_of_two_settings_are_not_mixed(tmp_path: Path) -> None:
    out = tmp_path / "grid.json"
    Results(out, HEAD, resume=False).write()
    with pytest.raises(ValueError, match="another settings"):
        Results(out, {**HEAD, "settings": {"rounds": 9}}, resume=True)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose every variant is a fake worker."""
    monkeypatch.setattr(environments, "STORE", tmp_path)
    monkeypatch.setattr(environments, "model_for", lambda environment, model, key: model)
    monkeypatch.setattr(
        environments, "command", lambda *named: [sys.executable, fake_worker.__file__]
    )
    monkeypatch.setattr(environments, "surroundings", lambda threads: dict(os.environ))
    options = {"rounds": 2, "steps": 4, "threads": 1, "timeout_s": 30}
    return Bench(models.prepare("reference", tmp_path), "reference", "float32", options)


def test_a_variant_that_fails_ends_its_own_part_of_the_cell_alone(bench: Bench) -> None:
    rows = [
        ("window", 64),
        ("a2sf", fake_worker.BROKEN),
        ("kvpress-tova", 64),
        ("kvpress-tova", fake_worker.DYING),
        ("openvino-evict", fake_worker.UNSUPPORTED),
        ("dynamic", None),
    ]
    try:
        entries = bench.measure(100, 4, rows)
    finally:
        bench.close()
    assert [(e["variant"], e["budget"]) for e in entries] == rows
    assert [e["status"] for e in entries] == [
        "measured",
        "failed",
        "failed",
        "failed",
        "not supported",
        "measured",
    ]
    assert "KeyError" in entries[1]["reason"]
    assert entries[2]["reason"].startswith("its worker ended")
    assert "exit 7" in entries[3]["reason"]
    assert entries[0]["ms_per_step"] == 2.0
    assert entries[0]["tokens_per_s"] == 2000.0
    # Two turns of an untimed step and four: the mean is over 102..105 and 107..110.
    assert entries[0]["kv_tokens"] == 106.0
    assert bench.versions["project"]["no-such-package"] == "not installed"


def test_a_cell_that_does_not_fit_the_memory_fails_with_the_free_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Little:
        available = 10**8

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    (entry,) = bench.measure(100, 4, [("dynamic", None)])
    assert entry["status"] == "failed"
    assert "0.1 are free" in entry["reason"]


def test_a_context_beyond_the_models_is_not_admitted(bench: Bench) -> None:
    assert bench.admits(512, 16)
    assert not bench.admits(1024, 1)


def document() -> dict[str, Any]:
    def cell(context: int, batch: int) -> dict[str, Any]:
        entries = [
            measured("a2sf", 128, 2.0, batch),
            measured("a2sf", 512, 4.0, batch),
            measured("dynamic", None, 8.0, batch),
            {"variant": "batching", "budget": None, "status": "not supported", "reason": "why"},
        ]
        compare(entries)
        return {
            "model": "random-12",
            "dtype": "float32",
            "context": context,
            "batch": batch,
            "entries": entries,
        }

    return {
        **HEAD,
        "left_out": ["reference at 2048 tokens: its context is 1024"],
        "versions": {"project": {"torch": "2"}},
        "cells": [cell(2048, 16), cell(512, 1), cell(512, 16)],
    }


def test_the_page_shows_ratios_first_and_every_reason() -> None:
    text = page.markdown(document(), "grid.json")
    _, at_128, at_512 = text.split("### Budget ")
    assert "| | 512 x 1 | 512 x 16 | 2048 x 16 |" in at_128
    assert "| ours, a2sf | 4.00 | 4.00 | 4.00 |" in at_128
    assert "| ours, a2sf | 2.00 | 2.00 | 2.00 |" in at_512
    assert at_128.index("Times faster") < at_128.index("Tokens/s")
    assert "| ours, a2sf | 500.0 | 8000.0 | 8000.0 |" in at_128
    assert "| ours, a2sf | 2.0 / 1.0 |" in at_128
    # What keeps all tokens stands beside both budgets.
    for part in (at_128, at_512):
        assert "| transformers generate | 1.00 | 1.00 | 1.00 |" in part
        assert "| transformers continuous batching | not supported (1) |" in part
    assert text.rstrip().endswith("1. transformers continuous batching: why")
    assert "Left out: reference at 2048 tokens" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_picture_has_a_line_for_each_variant_that_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "grid.svg"
    page.plot(document(), out, budget=512)
    text = out.read_text()
    assert "ours, a2sf" in text
    assert "transformers generate" in text
    assert "continuous batching" not in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_picture_has_no_panel_for_a_batch_that_was_not_measured(tmp_path: Path) -> None:
    out, measured = tmp_path / "grid.svg", document()
    measured["cells"] = [cell for cell in measured["cells"] if cell["batch"] == 16]
    page.plot(measured, out, budget=512)
    assert "batch 16" in out.read_text()
    assert out.read_text().count(", batch ") == 1
