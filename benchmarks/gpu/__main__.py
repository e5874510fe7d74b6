"""Checks this engine on a GPU, then times it beside its peers: `python -m benchmarks.gpu`.

Owns the order of the parts and how they share the time. Every part is imported when it begins, so
that a missing package is reported by name and the other parts still run.
"""

import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import RESULTS
from benchmarks.gpu import page
from benchmarks.gpu.report import Deadline, Report
from benchmarks.gpu.run import DRY, Run, Sizes

LAST_S = 20.0
"""Seconds kept for the page and for the end of running work."""


@dataclass(frozen=True)
class Part:
    """One part of the run."""

    name: str
    share: float
    """Share of the time, relative to the other parts; unused time goes to the later parts."""
    do: Callable[[Run], None]


def _machine(run: Run) -> None:
    from benchmarks.gpu import machine

    machine.measure(run)


def _checks(run: Run) -> None:
    from benchmarks.gpu import ahead, checks

    with ahead.compiling(run):
        checks.run_checks(run)


def _decode(run: Run) -> None:
    from benchmarks.gpu import decode

    decode.run_cells(run, run.sizes.cells)


def _small(run: Run) -> None:
    from benchmarks.gpu import decode

    decode.run_cells(run, run.sizes.small_cells)


def _alone(name: str) -> Callable[[Run], None]:
    def part(run: Run) -> None:
        from benchmarks.gpu import alone

        getattr(alone, name)(run)

    return part


def _prefill(name: str) -> Callable[[Run], None]:
    def part(run: Run) -> None:
        from benchmarks.gpu import prefill

        getattr(prefill, name)(run)

    return part


def _end_to_end(name: str) -> Callable[[Run], None]:
    def part(run: Run) -> None:
        from benchmarks.gpu import end_to_end

        getattr(end_to_end, name)(run)

    return part


def _compiled(run: Run) -> None:
    from benchmarks.gpu import workers

    workers.compiled(run, sys.executable)


def _kvpress(run: Run) -> None:
    from benchmarks.gpu import workers

    workers.kvpress(run)


def _server(run: Run) -> None:
    from benchmarks.gpu import server

    server.measure(run)


def _walk(run: Run) -> None:
    from benchmarks.gpu import walk

    walk.measure(run)


def _tuner(run: Run) -> None:
    from benchmarks.gpu import tuning

    tuning.measure(run)


FIRST = (Part("machine", 12, _machine), Part("checks", 120, _checks))
"""Always run: no timing is valid without them."""

PARTS = (
    Part("decode", 160, _decode),
    Part("concurrency", 40, _alone("concurrency")),
    Part("graphs", 20, _alone("graphs")),
    Part("lengths", 12, _alone("lengths")),
    Part("host", 15, _alone("host")),
    Part("attention", 10, _prefill("attention")),
    Part("prefill", 40, _prefill("whole")),
    Part("long-prompt", 50, _end_to_end("long_prompt")),
    Part("long-answer", 15, _end_to_end("long_answer")),
    Part("walk", 10, _walk),
    Part("tuner", 30, _tuner),
    Part("compiled", 60, _compiled),
    Part("kvpress", 30, _kvpress),
    Part("decode-1b", 25, _small),
    Part("server", 50, _server),
)
"""The most informative parts first. Those on the small model come last, because it replaces the
large one in memory."""


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Longest time of the whole run.")] = 10,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"After machine and checks: {', '.join(p.name for p in PARTS)}."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The JSON; .md and .svg beside it. By the GPU's name.")
    ] = None,
    peer_python: Annotated[
        Path | None, typer.Option(help="An interpreter whose environment has kvpress.")
    ] = None,
    dry: Annotated[bool, typer.Option("--dry", hidden=True)] = False,
) -> None:
    """Check, then time. Exits with 1 if the checks did not pass."""
    unknown = set(only or []) - {part.name for part in PARTS}
    if unknown:
        raise typer.BadParameter(f"no such part: {', '.join(sorted(unknown))}")
    if not dry and not torch.cuda.is_available():
        typer.echo("benchmarks.gpu needs a CUDA device, and torch finds none here.", err=True)
        raise typer.Exit(2)
    chosen = [part for part in PARTS if not only or part.name in only]
    device = torch.device("cpu" if dry else "cuda")
    if out is None and not dry:
        slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
        out = RESULTS / f"gpu-{slug}.json"
    head = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *map(_bare, sys.argv[1:])]),
        "settings": {"minutes": minutes},
    }
    run = Run(
        device=device,
        report=Report(None if dry else out, head),
        dry=dry,
        deadline=Deadline(time.monotonic()),
        peer_python=peer_python,
        sizes=DRY if dry else Sizes(),
    )
    if not dry:
        # On SIGTERM, write the page of the results so far.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        passed = carry_out(run, chosen, 60 * minutes)
    finally:
        if out is not None and not dry:
            publish(run.report, out)
    if dry:
        for part in run.report.document["parts"]:
            typer.echo(f"dry run: no figure: {part['name']}: {part['status']}")
    raise typer.Exit(0 if passed else 1)


def carry_out(run: Run, parts: list[Part], seconds: float) -> bool:
    """Run the first parts and these, each within its share; return whether the checks passed."""
    end = Deadline(time.monotonic() + seconds - LAST_S)
    ahead = [*FIRST, *parts]
    while ahead:
        part, *ahead = ahead
        shares = part.share + sum(other.share for other in ahead)
        failed = run.report.document["checks"] == "failed"
        with run.report.part(part.name) as about:
            if failed or end.left <= 0:
                about["status"] = "skipped"
                about["reason"] = "the checks failed" if failed else "the time is up"
                continue
            run.deadline = end.within(end.left * part.share / shares)
            _say(run, f"{part.name}: up to {run.deadline.left:.0f} s")
            part.do(run)
        run.free()
        if "reason" in about:
            _say(run, f"{part.name}: {about['status']}: {about['reason']}")
    return bool(run.report.document["checks"] == "passed")


def publish(report: Report, out: Path) -> None:
    """Write the page and the picture beside the document."""
    out.with_suffix(".md").write_text(page.markdown(report.document, out.name))
    try:
        drawn = page.plot(report.document, out.with_suffix(".svg"))
    except ImportError as missing:
        typer.echo(f"no picture: {missing}", err=True)
        drawn = False
    typer.echo(f"written to {out}, and .md{' and .svg' if drawn else ''} beside it")


def _bare(word: str) -> str:
    """An argument without the directories of a path."""
    return Path(word).name if "/" in word else word


def _say(run: Run, line: str) -> None:
    typer.echo(f"dry run: no figure: {line}" if run.dry else line)


if __name__ == "__main__":
    typer.run(main)
