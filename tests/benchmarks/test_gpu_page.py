"""The page and the picture of a run. The figures are FAKE: made up for this test, of no GPU."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import machine, page
from benchmarks.gpu.__main__ import PARTS, publish
from benchmarks.gpu.report import NotSupported, Report
from benchmarks.gpu.timing import figures
from tests.benchmarks.test_gpu import HEAD


def step(report: Report, variant: str, batch: int, context: int, ms: float, **more: Any) -> None:
    cell = f"8b, {context} x {batch}, budget 1024"
    report.add(
        f"{cell}: {variant}",
        cell=cell,
        context=context,
        batch=batch,
        budget=1024 if variant in ("a2sf", "table", "window") else None,
        variant=variant,
        kv_bytes=2_500_000_000,
        **figures([[ms, ms], [ms, ms + 1]], batch),
        **more,
    )


@pytest.fixture
def fake(tmp_path: Path) -> Report:
    report = Report(tmp_path / "gpu-fake.json", HEAD)
    report.document["machine"] = {"device": "FAKE GPU", "torch": "0", "copy_gb_per_s": 1.5}
    report.document["checks"] = "passed"
    with report.part("checks"):
        report.add("Decode kernel against float64", "passed", what="200 random cases")
    with report.part("decode"):
        for context in (4096, 32768):
            for batch in (1, 8):
                step(report, "dynamic", batch, context, 20.0, times_faster_than_transformers=1.0)
                step(
                    report,
                    "a2sf",
                    batch,
                    context,
                    5.0,
                    times_faster_than_transformers=4.0,
                    price_of_scoring={"median": 0.031, "quartiles": [0.02, 0.04]},
                    roofline_share=0.75,
                )
        report.missed(
            "8b, 32768 x 64, budget 1024: dynamic", MemoryError("no room"), variant="dynamic"
        )
    with report.part("lengths"):
        report.add("step time", slope_ms_per_100k_tokens=0.01, times=3.0)
    with report.part("kvpress"):
        raise NotSupported("not installed here")
    return report


def test_ratios_come_before_times_and_machine_before_both(fake: Report) -> None:
    text = page.markdown(fake.document, "gpu-fake.json")
    order = [
        "- device: FAKE GPU",
        "## Checks",
        "Times faster than transformers",
        "| 8b, 4096 x 8, budget 1024 | ours, a2sf .9 | 4.00 | +3.1% [+2.0%, +4.0%] | 75% |",
        "Milliseconds a step",
        "| 8b, 4096 x 8, budget 1024 | ours, a2sf .9 | 5.250 | [5.125, 5.375] | 6.000 | 1524 |",
        "- step time: times 3, slope ms per 100k tokens 0.01",
        "## Not measured",
    ]
    places = [text.index(line) for line in order]
    assert places == sorted(places)
    assert "no timing here is valid" not in text
    assert "2026-01-01; from `gpu-fake.json`" in text


def test_missing_measurements_are_listed_with_their_reason(fake: Report) -> None:
    text = page.markdown(fake.document, "gpu-fake.json")
    assert "- kvpress: not supported: not installed here" in text
    assert "- 8b, 32768 x 64, budget 1024: dynamic: failed: MemoryError: no room" in text


@pytest.mark.parametrize("checks", ["failed", "incomplete", "not run"])
def test_no_timing_is_valid_without_the_checks(fake: Report, checks: str) -> None:
    fake.document["checks"] = checks
    assert f"**The checks are {checks}: no timing here is valid.**" in page.markdown(
        fake.document, "gpu-fake.json"
    )


def test_a_picture_is_drawn_of_tokens_by_context_and_batch(fake: Report, tmp_path: Path) -> None:
    out = tmp_path / "gpu-fake.json"
    publish(fake, out)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".svg"]
    drawn = out.with_suffix(".svg").read_text()
    ET.fromstring(drawn)
    for told in ("FAKE GPU: decoding at budget 1024", "context 4,096", "transformers, dynamic"):
        assert told in drawn


def test_nothing_is_drawn_where_no_step_was_timed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.svg"
    assert not page.plot(Report(None, HEAD).document, out)
    assert not out.exists()


def test_every_part_has_a_title() -> None:
    assert {part.name for part in PARTS} | {"machine", "checks"} == set(page.TITLES)


def test_parts_that_a_machine_cannot_run_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = machine.describe(torch.device("cpu"))
    assert found["nvidia_smi"] == "no answer: FileNotFoundError"
    assert found["torch"] == torch.__version__


def test_the_clocks_are_those_that_the_driver_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = tmp_path / "nvidia-smi"
    answer.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 2619 MHz, 1980 MHz, 700 W, 81559 MiB'\n")
    answer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = machine.describe(torch.device("cpu"))
    assert found["driver_version"] == "580.1"
    assert found["clocks_max_sm"] == "1980 MHz"
    assert found["memory_total"] == "81559 MiB"
