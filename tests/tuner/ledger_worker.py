"""One worker of a fit, as a process: three batches, each made from what the one before cost.

    python -m tests.tuner.ledger_worker STORAGE STUDY DIRECTORY SECONDS

STORAGE is a URL or the path of a journal. It notes in DIRECTORY/events, in lines of
kind, batch, index and process, when it begins and ends a point and when it has passed a batch, and
writes its answer for every point to DIRECTORY/PID.json.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tuner.study.ledger import Ledger, Timing
from tuner.study.records import PointCost
from tuner.study.storage import open_storage

BATCHES = 3
POINTS = 6

PACE = Timing(poll=0.05, lease_period=0.1, lease_grace=2.0, max_outage=60.0)


def cost(point: dict[str, Any]) -> PointCost:
    """What a point costs, in every process alike; every third is given up early."""
    x = point["x"]
    kl = [abs(x - 0.3) + 0.01 * example for example in range(2 if x * 100 % 3 < 1 else 4)]
    return PointCost(kl=kl, nll=[1 + k for k in kl], evaluations=len(kl), pruned=len(kl) == 2)


def note(directory: Path, kind: str, batch: int, index: int) -> None:
    """Append a line in one write, so that lines of many processes do not mix."""
    with (directory / "events").open("ab", buffering=0) as file:
        file.write(f"{kind} {batch} {index} {os.getpid()}\n".encode())


def search(ledger: Ledger, directory: Path, seconds: float) -> list[list[PointCost]]:
    """Measure all batches; `seconds` for each point."""
    start, found = 0.5, []
    for number in range(BATCHES):
        points = [{"x": start + index / 100} for index in range(POINTS)]

        def measure(index: int, point: dict[str, Any], batch: int = number) -> PointCost:
            note(directory, "begun", batch, index)
            time.sleep(seconds)
            note(directory, "ended", batch, index)
            return cost(point)

        found.append(ledger.measure(f"batch {number}", points, measure))
        note(directory, "passed", number, 0)
        start = points[min(range(POINTS), key=lambda i: (found[-1][i].mean, i))]["x"] - 0.03
    return found


def main(address: str, study: str, directory: Path, seconds: float) -> None:
    url = address if "://" in address else None
    storage, _ = open_storage(url, Path(address))
    ledger = Ledger(storage, study, {"seed": 0}, PACE)
    decided = ledger.decide_once("who", os.getpid())
    found = search(ledger, directory, seconds)
    reported = [[vars(one) for one in batch] for batch in found]
    text = json.dumps({"decided": decided, "found": reported})
    (directory / f"{os.getpid()}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
