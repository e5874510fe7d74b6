"""Times decoding with filled caches: this engine and its peers, by model, context and batch.

Owns the grid and the order of measuring. Each variant runs in a worker process (`peers/`). Within a
cell (model, dtype, context, batch) the variants alternate, round after round, and are compared
within the cell. Results are written after every cell, so that `--resume` continues an interrupted
run. Knows nothing of a peer's code.

    python -m benchmarks.grid [--model random] [--context 2048] [--variant a2sf] [--resume] ...
"""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks import RESULTS
from benchmarks.peers import environments, models, page
from benchmarks.peers.bench import UNTIMED, Bench
from benchmarks.peers.results import Key, Results, Row
from benchmarks.peers.variants import VARIANTS, bandwidth, predicted_ms
from tuner.evaluation import machine

PLOTTED_BUDGET = 512


def rows_of(variants: list[str], budgets: list[int]) -> list[Row]:
    """List the entries of a cell: a bounded variant at each budget, any other once."""
    return [
        (name, budget)
        for name in variants
        for budget in (budgets if VARIANTS[name].bounded else [None])
    ]


def parts(wanted: list[str], dtypes: list[str] | None) -> Iterator[tuple[str, str]]:
    """Yield models and dtypes to measure; by default only the random model in bfloat16 also."""
    for model in wanted:
        for dtype in dtypes or (["float32", "bfloat16"] if model == "random" else ["float32"]):
            yield model, dtype


def main(
    model: Annotated[list[str] | None, typer.Option(help=", ".join(models.MODELS))] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Prompt tokens of a row.")] = None,
    budget: Annotated[list[int] | None, typer.Option(help="Tokens that a row may keep.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows that decode together.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=", ".join(VARIANTS))] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each variant.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a turn.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = os.cpu_count() or 1,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the random model.")] = 12,
    timeout_s: Annotated[
        float, typer.Option(help="Longest wait for a worker's answer, in seconds.")
    ] = 1800,
    resume: Annotated[bool, typer.Option(help="Keep cells that are already measured.")] = False,
    out: Annotated[Path, typer.Option(help="The JSON; .md and .svg beside it.")] = RESULTS
    / "grid-cpu.json",
) -> None:
    """Measure the grid, or the selected part of it."""
    unknown = set(variant or []) - set(VARIANTS)
    if unknown:
        raise typer.BadParameter(f"no such variant: {', '.join(sorted(unknown))}")
    options = {"rounds": rounds, "steps": steps, "threads": threads}
    head = {
        "date": _today(),
        "machine": {
            "processor": machine.processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
        },
        "settings": {**options, "untimed": UNTIMED},
        "left_out": [],
    }
    try:
        results = Results(out, head, resume=resume)
    except ValueError as mixed:
        raise typer.BadParameter(str(mixed)) from mixed
    rows = rows_of(variant or list(VARIANTS), budget or [128, 512])
    for name, number in parts(model or list(models.MODELS), dtype):
        directory = models.prepare(name, environments.STORE / "models", layers)
        label = directory.name if name == "random" else name
        bench = Bench(directory, label, number, {**options, "timeout_s": timeout_s})
        try:
            for length in sorted(context or [512, 2048, 8192]):
                for size in sorted(batch or [1, 4, 16], reverse=True):
                    _cell(results, bench, (label, number, length, size), rows)
        finally:
            bench.close()
    results.write()
    out.with_suffix(".md").write_text(page.markdown(results.document, out.name))
    picture = out.with_suffix(".svg")
    page.plot(results.document, picture, budget=PLOTTED_BUDGET)
    typer.echo(f"written to {out}, and .md and .svg beside it")


def _cell(results: Results, bench: Bench, key: Key, rows: list[Row]) -> None:
    label, _, context, batch = key
    if not bench.admits(context, batch):
        reason = f"{label} at {context} tokens: its context is {bench.shape.max_context}"
        if reason not in results.document["left_out"]:
            results.document["left_out"].append(reason)
        return
    if not results.missing(key, rows):
        return
    start = time.monotonic()
    speed = bandwidth(bench.threads)
    entries = bench.measure(context, batch, rows)
    for entry in entries:
        if "step_bytes" in entry:
            entry["predicted_ms"] = round(predicted_ms(entry["step_bytes"], speed), 4)
    for environment, versions in bench.versions.items():
        results.document["versions"].setdefault(environment, {}).update(versions)
    taken = time.monotonic() - start
    about = {"date": _today(), "read_gb_per_s": round(speed / 1e9, 2), "took_s": round(taken, 1)}
    results.put(key, about, entries)
    typer.echo(f"{' '.join(str(part) for part in key)}: {taken:.0f} s")
    for entry in entries:
        figure = entry.get("ms_per_step")
        typer.echo(
            f"  {entry['variant']:16s} {entry['budget'] or '':>5}  "
            + (f"{figure:9.2f} ms" if figure else f"{entry['status']}: {entry['reason']}")
        )


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


if __name__ == "__main__":
    typer.run(main)
