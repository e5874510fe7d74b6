"""Compares peers in separate processes with this engine: compiled transformers, and kvpress.

Each peer has a separate random model of the same shape. A worker that does not answer in time is
ended. Knows how to call workers, not what they do.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.filling import Rows, policies
from benchmarks.gpu.models import DRY_SHAPES, SHAPES
from benchmarks.gpu.report import NotSupported
from benchmarks.gpu.run import Run
from benchmarks.gpu.timing import Turn, figures, turn
from benchmarks.peers.client import Client

SCRIPT = Path(__file__).with_name("worker.py")


def compiled(run: Run, interpreter: str) -> None:
    """Measure `generate`'s static cache with its compiled forward pass, within the part's time."""
    _beside(run, interpreter, "eager" if run.dry else "static", "transformers static, compiled")


def kvpress(run: Run) -> None:
    """Measure kvpress's presses at this engine's budget, in the environment that has it."""
    if run.peer_python is None:
        raise NotSupported("kvpress is not installed here; --peer-python names where it is")
    for press in ("knorm", "tova"):
        with run.report.entry(f"kvpress {press}"):
            run.deadline.check()
            _beside(run, str(run.peer_python), press, f"kvpress {press}")


def _beside(run: Run, interpreter: str, kind: str, label: str) -> None:
    """Alternate between a worker and this engine in one cell."""
    cell, sizes = run.sizes.worker_cell, run.sizes
    model = run.model(cell.model)
    chosen = policies(model, cell.budget, cell.context + 1)["a2sf"]
    rows = Rows(model, cell.batch, cell.budget, graphs=True)
    ours: list[Turn] = []
    theirs: list[Turn] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        shape = (DRY_SHAPES if run.dry else SHAPES)[cell.model]
        shape.config().save_pretrained(directory)
        client = Client([interpreter, str(SCRIPT), kind], dict(os.environ), directory / "log")

        def ask(**command: Any) -> dict[str, Any]:
            run.deadline.check()
            return client.ask(run.deadline.left, **command)

        try:
            versions = ask(
                do="load", model=folder, dtype=model.dtype_name, threads=os.cpu_count() or 1
            )["versions"]
            held = ask(
                do="fill",
                seat="a",
                prompt=[2 + at % 200 for at in range(cell.context)],
                batch=cell.batch,
                budget=cell.budget,
                turn=sizes.untimed + sizes.steps,
                room=(sizes.rounds + 1) * (sizes.untimed + sizes.steps),
            )
            # The first turn includes compilation.
            ask(do="steps", seat="a", untimed=sizes.untimed, count=sizes.steps)
            sides: dict[str, Callable[[], None]] = {
                "ours": lambda: ours.append(_turn_of_ours(run, rows, chosen)),
                "theirs": lambda: theirs.append(
                    ask(do="steps", seat="a", untimed=sizes.untimed, count=sizes.steps)["ms"]
                ),
            }
            for number in range(sizes.rounds):
                for side in sorted(sides, reverse=bool(number % 2)):
                    sides[side]()
        except Exception as error:
            if not (ours and theirs):
                raise
            run.report.missed(f"{cell.name}: {label}, the last turns", error)
        finally:
            client.end(10)
    mine, other = figures(ours, cell.batch), figures(theirs, cell.batch)
    about: dict[str, Any] = {"cell": cell.name, "context": cell.context, "batch": cell.batch}
    run.report.add(
        f"{cell.name}: {label}",
        **about,
        variant=kind,
        versions=versions,
        kv_bytes=held["kv_bytes"],
        **other,
    )
    run.report.add(
        f"{cell.name}: ours beside {label}",
        **about,
        variant="a2sf",
        **mine,
        times_faster=round(other["ms_per_step"] / mine["ms_per_step"], 3),
    )


def _turn_of_ours(run: Run, rows: Rows, policy: Any) -> Turn:
    rows.fill(policy, run.sizes.worker_cell.context)
    return turn(rows.step, run.sizes.untimed, run.sizes.steps)
