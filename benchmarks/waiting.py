"""Times the cost of waiting threads: tokens per second of the engine, alone and beside other work.

Owns one comparison: how the threads of a computation wait for each other, by spinning for a while
or by sleeping at once. Each way has an engine in a separate process. All alternate, on the
otherwise idle machine and beside as many busy loops as it has cores.

    python -m benchmarks.waiting [--streams 1 --streams 8] [--rounds 7] [--out FILE]
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy
import typer

from a2sf.model.loader import load_model
from benchmarks import RESULTS, save
from benchmarks.peers.models import prepare
from benchmarks.serving import CORES, Alone, rate

WAYS: dict[str, dict[str, str]] = {
    "libgomp's default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
"""Environment variables of each engine, in addition to those of this process."""

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` processes busy with an empty loop."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def compare(
    model: Annotated[list[str] | None, typer.Option(help="random (100M) or reference.")] = None,
    streams: Annotated[list[int] | None, typer.Option(help="Completions at once.")] = None,
    loops: Annotated[
        list[int] | None, typer.Option(help="Busy loops that run at the same time.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the engine.")] = CORES,
    tokens: Annotated[int, typer.Option(help="Tokens of each completion.")] = 16,
    rounds: Annotated[int, typer.Option(help="Turns of each way.")] = 11,
    out: Annotated[Path, typer.Option(help="File of the JSON.")] = RESULTS / "waiting-cpu.json",
) -> None:
    """Time all ways in turns and write the figures with machine and versions."""
    bare = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    counts = streams or [1, 8]
    rows: list[dict[str, Any]] = []
    for name in model or ["random"]:
        directory = prepare(name, Path("build/peers/models"))
        with ExitStack() as stack:
            engines = {
                way: stack.enter_context(
                    closing(Alone(directory, max(counts), threads, {**bare, **extra}))
                )
                for way, extra in WAYS.items()
            }
            for count in counts:
                for other in loops or [0, CORES]:
                    rates = _turns(engines, count, tokens, rounds, other)
                    rows += [
                        {"model": name, "streams": count, "busy_loops": other, "way": way}
                        | _spread(found)
                        for way, found in rates.items()
                    ]
                    for row in rows[-len(WAYS) :]:
                        typer.echo(json.dumps(row))
    loaded = load_model(str(directory), device="cpu", dtype="float32")
    save(out, loaded, threads=threads, tokens=tokens, rounds=rounds, rows=rows)


def _turns(
    engines: dict[str, Alone], streams: int, tokens: int, rounds: int, other: int
) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {way: [] for way in engines}
    with busy(other):
        for turn in range(rounds):
            # Vary the order, so that no way always comes first, or always follows the same one.
            ways = list(engines)[:: -1 if turn % 2 else 1]
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                rates[way].append(rate(engines[way].run(streams, tokens)))
            typer.echo({way: round(found[-1], 2) for way, found in rates.items()}, err=True)
    return rates


def _spread(rates: list[float]) -> dict[str, Any]:
    quartiles = numpy.percentile(rates, [25, 75]).tolist()
    return {
        "tokens_per_s_median": round(float(numpy.median(rates)), 2),
        "tokens_per_s_quartiles": [round(q, 2) for q in quartiles],
        "tokens_per_s_best": round(max(rates), 2),
    }


if __name__ == "__main__":
    typer.run(compare)
