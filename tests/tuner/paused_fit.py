"""The tuner's command line as a process that stands still at one point, until a signal comes.

    python -m tests.tuner.paused_fit POINT NOTE ARGUMENT...

POINT is one of POINTS; when the process gets there, it makes the file NOTE and waits.
"""

import importlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTS = {
    "loading": ("tuner.fit", "load_model", 1),
    "the full cache": ("tuner.evaluation.objective", "full_cache", 1),
    "the grid": ("tuner.evaluation.objective.Objective", "cost", 3),
    "a stage": ("tuner.evaluation.objective.Objective", "cost", 6),
    "the proof": ("tuner.evaluation.objective.Objective", "costs", 7),
    "writing": ("os", "fsync", -1),
}
"""Where it stands still: a function, and at which of its calls; -1: of the table's file."""


def main(point: str, note: Path, arguments: list[str]) -> None:
    # A shell that starts a test in the background ignores the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place, name, turn = POINTS[point]
    sys.argv = ["a2sf-tune", *arguments]
    import tuner.fit  # noqa: F401 - what is patched below
    from tuner.__main__ import main as run

    module, _, owner = place.partition(".Objective")
    target: Any = importlib.import_module(module)
    if owner or place.endswith("Objective"):
        target = target.Objective
    honest: Callable[..., Any] = getattr(target, name)
    calls = 0

    def paused(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        writing = turn < 0 and Path(f"/proc/self/fd/{given[0]}").readlink().suffix == ".tmp"
        if calls == turn or writing:
            note.touch()
            while True:
                signal.pause()
        return honest(*given, **named)

    setattr(target, name, paused)
    run()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
