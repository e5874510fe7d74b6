"""Measures one cell of the grid: fills every variant, then times them in turns.

Owns the workers of one model and dtype, and the order of measuring. Knows nothing of a peer's code,
or of the grid.
"""

from pathlib import Path
from typing import Any

import psutil
import typer

from benchmarks.peers import environments, models
from benchmarks.peers.client import Client, Gone, Refused
from benchmarks.peers.models import Shape
from benchmarks.peers.results import Row, summarise
from benchmarks.peers.variants import VARIANTS

UNTIMED = 1
"""Steps of a turn that are not timed: they bring the worker's data back into the CPU's caches."""


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
                typer.echo(f"  {row[0]} could not drop its rows: {error}", err=True)
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
            environments.surroundings(self.threads) | variant.variables,
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
                failed[other] = {"status": "failed", "reason": f"its worker ended: {error}"}

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
