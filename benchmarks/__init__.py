"""Side-by-side measurements. Results stand in `results/` with machine, versions and date."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from a2sf.models import LoadedModel
from tuner import machine

RESULTS = Path(__file__).parent / "results"


def save(out: Path, ran: LoadedModel, /, **figures: Any) -> None:
    """Write figures as JSON, with the date and the machine that the model `ran` on."""
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(ran.device, ran.dtype),
        **figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {out}")
