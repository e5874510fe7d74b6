"""Comparative measurements. Results are in `results/`, with machine, versions and date."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from a2sf.model.loader import LoadedModel
from tuner.evaluation import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def save(out: Path, ran: LoadedModel, /, **figures: Any) -> None:
    """Write figures as JSON, with the date and the machine that the model `ran` on."""
    write(out, machine.describe(ran.device, ran.dtype), **figures)


def write(out: Path, described: Mapping[str, str], /, **figures: Any) -> None:
    """Write figures as JSON, with the date and the machine as described by `tuner.machine`."""
    document = {"date": datetime.now(UTC).date().isoformat(), "machine": described, **figures}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {out}")
