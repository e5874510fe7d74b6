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
from typing import Annotated, Any

import psutil
import typer

from benchmarks import RESULTS
from benchmarks.peers import environments, models, page
from benchmarks.peers.client import Client, Gone, Refused
from benchmarks.peers.models import Shape
from benchmarks.peers.results import Key, Results, Row, summarise
from benchmarks.peers.variants import VARIANTS, bandwidth, predicted_ms
from tuner.evaluation import machine

UNTIMED = 1
"""Steps of a turn that are not timed: they bring the worker's data back into the CPU's caches."""

PLOTTED_BUDGET = 512
PLOTTED_BATCHES = (1, 16)


class Bench:
    """The workers of one model and dtype, started on first use."""

    def __init__(self, model: Path, name: str, dtype: str, options: dict[str, Any]) -> None:
        self.name, self.dtype, self.model = name, dtype, model
        self.shape = Shape.read(model)
        self.rounds: int = options["rounds"]
        self.steps: int = options["steps"]
        self.threads: int = options["threads"]
        self._timeout_s: float = options["timeout_s"]
        self._clients: dict[str, Client] = {}
        self.versions: dict[str, dict[str, str]] = {}

    @property
    def turn(self) -> int:
        """Steps of a turn."""
        return UNTIMED + self.steps

    @property
    def room(self) -> int:
        """The number of steps that a row needs room for."""
        return self.rounds * self.turn + 1

    def admits(self, context: int, batch: int) -> bool:
        """Whether the model has positions for the prompt, the steps, and the filling of others."""
        return context + self.room + 2 * batch + 2 <= self.shape.max_context

    def measure(self, context: int, batch: int, rows: list[Row]) -> list[dict[str, Any]]:
        """Measure one cell: fill every row's seat, alternate, and return the results.

        The results are each row's figures, or the reason for its failure. A variant that fails ends
        only its part of the cell.
        """
        filled: dict[Row, dict[str, Any]] = {}
        failed: dict[Row, dict[str, Any]] = {}
        turns: dict[Row, list[list[float]]] = {}
        held: dict[Row, list[float]] = {}
        for row in rows:
            try:
                filled[row] = self._fill(row, context, batch)
                turns[row], held[row] = [], []
            except Exception as error:
                self._fail(row, error, filled, failed)
        for turn in range(self.rounds):
            alive = list(filled)
            # Each round begins with another variant, so that no variant always follows the same
            # one.
            for row in alive[turn % max(1, len(alive)) :] + alive[: turn % max(1, len(alive))]:
                if row not in filled:
                    continue
                try:
                    answer = self._ask(
                        row, do="steps", seat=_seat(row), untimed=UNTIMED, count=self.steps
                    )
                    turns[row].append(answer["ms"])
                    held[row].append(answer["kv_tokens"])
                except Exception as error:
                    self._fail(row, error, filled, failed)
        for row in list(filled):
            try:
                self._ask(row, do="drop", seat=_seat(row))
            except Exception as error:
                # The row was measured. The worker is ended, and the next cell starts a new one.
                typer.echo(f"  {row[0]} could not let its rows go: {error}", err=True)
                self._end(row[0])
        return [
            {"variant": row[0], "budget": row[1]}
            | (
                failed[row]
                if row in failed
                else {
                    "status": "measured",
                    **filled[row],
                    "kv_tokens": round(sum(held[row]) / len(held[row]), 2),
                    **summarise(turns[row], batch),
                }
            )
            for row in rows
        ]

    def _fill(self, row: Row, context: int, batch: int) -> dict[str, Any]:
        variant, budget = VARIANTS[row[0]], row[1]
        tokens = context + self.room if budget is None else min(budget, context)
        needed = (batch * tokens + 2 * context) * self.shape.token_bytes(self.dtype) + 2**30
        free = psutil.virtual_memory().available
        if needed > free:
            raise MemoryError(f"needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} are free")
        if row[0] not in self._clients:
            self._start(row[0])
        answer = self._ask(
            row,
            do="fill",
            seat=_seat(row),
            prompt=models.prompt(self.shape.vocabulary, context),
            batch=batch,
            budget=budget,
            turn=self.turn,
            room=self.room,
        )
        moved = variant.step_bytes(
            self.shape, dtype=self.dtype, context=context, batch=batch, budget=budget
        )
        return {
            "prefill_s": round(answer["prefill_s"], 4),
            "kv_bytes": answer["kv_bytes"],
            "step_bytes": moved,
        }

    def _start(self, name: str) -> None:
        variant = VARIANTS[name]
        model = environments.model_for(variant.environment, self.model, self.name)
        client = self._clients[name] = Client(
            environments.command(variant.environment, variant.module, variant.arguments),
            environments.surroundings(self.threads),
            environments.STORE / "logs" / f"{name}.log",
        )
        answer = client.ask(
            self._timeout_s, do="load", model=str(model), dtype=self.dtype, threads=self.threads
        )
        self.versions.setdefault(variant.environment, {}).update(answer["versions"])

    def _ask(self, row: Row, **command: Any) -> dict[str, Any]:
        return self._clients[row[0]].ask(self._timeout_s, **command)

    def _fail(
        self,
        row: Row,
        error: Exception,
        filled: dict[Row, dict[str, Any]],
        failed: dict[Row, dict[str, Any]],
    ) -> None:
        unsupported = isinstance(error, Refused) and not error.supported
        status = "not supported" if unsupported else "failed"
        failed[row] = {"status": status, "reason": str(error) or type(error).__name__}
        typer.echo(f"  {row[0]} {row[1] or ''}: {status}: {error}", err=True)
        filled.pop(row, None)
        if isinstance(error, Refused) and row[0] in self._clients:
            try:
                self._ask(row, do="drop", seat=_seat(row))
            except (Refused, Gone):
                self._end(row[0])
        elif isinstance(error, Gone):
            self._end(row[0])
        if row[0] not in self._clients:
            for other in [r for r in filled if r[0] == row[0]]:
                filled.pop(other)
                failed[other] = {"status": "failed", "reason": f"went with its worker: {error}"}

    def _end(self, name: str) -> None:
        client = self._clients.pop(name, None)
        if client is not None:
            client.end()

    def close(self) -> None:
        """End every worker."""
        for name in list(self._clients):
            self._end(name)


def _seat(row: Row) -> str:
    return str(row[1])


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
    timeout_s: Annotated[float, typer.Option(help="The most a worker may take to answer.")] = 1800,
    resume: Annotated[bool, typer.Option(help="Keep cells that are measured already.")] = False,
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
    page.plot(results.document, picture, budget=PLOTTED_BUDGET, batches=PLOTTED_BATCHES)
    typer.echo(f"written to {out}, and .md and .svg beside it")


def _cell(results: Results, bench: Bench, key: Key, rows: list[Row]) -> None:
    label, _, context, batch = key
    if not bench.admits(context, batch):
        told = f"{label} at {context} tokens: its context is {bench.shape.max_context}"
        if told not in results.document["left_out"]:
            results.document["left_out"].append(told)
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
