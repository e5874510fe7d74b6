"""Times the cost of scoring: a decode step under `a2sf` and under `window`, in one process.

Owns one measurement. Both policies keep the same number of slots and evict one token per step; only
`a2sf` computes scores to choose the token. They share a process, a model and its memory, and
alternate, so they differ in nothing else. The grid's separate processes cannot guarantee this to
within a few percent.

    python -m benchmarks.scoring [--dtype float32] [--budget 512] [--batch 16] [--out FILE]
"""

import os
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer

from a2sf.model.loader import load_model
from benchmarks import RESULTS, save
from benchmarks.peers.loop import Filling
from benchmarks.peers.models import prepare, prompt
from benchmarks.peers.worker_ours import Method, Rows

METHODS: tuple[Method, ...] = ("a2sf", "window")


def main(
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16.")] = None,
    budget: Annotated[list[int] | None, typer.Option(help="Slots of a row.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows that decode together.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each policy.")] = 40,
    steps: Annotated[int, typer.Option(help="Steps of a turn.")] = 4,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="File of the JSON.")] = RESULTS / "scoring-cpu.json",
) -> None:
    """Time both policies and write the figures with machine and versions."""
    torch.set_num_threads(threads)
    directory = prepare("random", Path("build/peers"))
    rows: list[dict[str, Any]] = []
    for precision in dtype or ["float32", "bfloat16"]:
        model = load_model(str(directory), device="cpu", dtype=precision)
        for slots in budget or [128, 512]:
            ids = prompt(model.shape.vocab_size, slots + 64)
            for size in batch or [1, 4, 16]:
                room = rounds * steps
                filling = Filling(prompt=ids, batch=size, budget=slots, turn=steps, room=room)
                engines = {method: Rows(model, method, filling) for method in METHODS}
                turns: dict[Method, list[float]] = {method: [] for method in METHODS}
                for turn in range(rounds):
                    # Alternate the order, so that neither policy always comes first.
                    for method in METHODS if turn % 2 else reversed(METHODS):
                        taken = [1e3 * engines[method].step() for _ in range(steps)]
                        turns[method].append(float(numpy.median(taken)))
                a2sf, window = (numpy.array(turns[method]) for method in METHODS)
                low, price, high = numpy.percentile(a2sf / window - 1, [25, 50, 75]).tolist()
                rows.append(
                    {
                        "dtype": precision,
                        "budget": slots,
                        "batch": size,
                        "a2sf_ms_median": round(float(numpy.median(a2sf)), 3),
                        "window_ms_median": round(float(numpy.median(window)), 3),
                        "price_median": round(price, 4),
                        "price_quartiles": [round(low, 4), round(high, 4)],
                    }
                )
                typer.echo(
                    f"{precision:9s} budget {slots:4d}  batch {size:2d}  "
                    f"{rows[-1]['a2sf_ms_median']:7.2f} ms  {rows[-1]['window_ms_median']:7.2f} ms "
                    f" price {price:+.1%} [{low:+.1%}, {high:+.1%}]"
                )
    save(out, model, model="random, as in the grid", rounds=rounds, steps=steps, rows=rows)


if __name__ == "__main__":
    typer.run(main)
