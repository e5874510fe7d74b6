"""Times decode steps with filled caches: this engine's policies beside transformers, by cell.

Within a cell the variants alternate, round after round, and each round begins with another variant.
Rows of all bounded policies use one slab and one set of graphs, and are refilled before each turn.
A growing cache of transformers is also made again for each turn, so that memory holds one at a
time. Knows nothing of peers except their steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from a2sf.model.loader import LoadedModel
from a2sf.policy import EffectivePolicy
from benchmarks.gpu.filling import Rows, kv_step_bytes, policies
from benchmarks.gpu.models import plain, token_bytes, weight_bytes
from benchmarks.gpu.peers import Batching, Dynamic
from benchmarks.gpu.report import OutOfTime, failure_entry
from benchmarks.gpu.run import Cell, Run
from benchmarks.gpu.timing import Turn, figures, spread, turn

BOUNDED = ("a2sf", "table", "window")

BASE = "dynamic"
"""The variant in the denominator of ratios."""

CELL_S = 8.0
"""Seconds that must be left for a cell to begin."""


class Stepping(Protocol):
    """Rows that decode together."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV memory."""
        ...

    def step(self) -> None:
        """Decode a token of every row and bring it to the host."""
        ...


@dataclass
class Variant:
    """How to prepare a variant's rows for a turn, and how to release them."""

    name: str
    open: Callable[[], Stepping]
    close: Callable[[Stepping], None]
    step_bytes: int
    """The least bytes that a step must move: the weights, and the KV in use, each once."""


@dataclass
class Measured:
    """A variant's turns, or the reason that there are none."""

    turns: list[Turn]
    kv_bytes: int = 0
    failure: Exception | None = None


def run_cells(run: Run, cells: tuple[Cell, ...]) -> None:
    """Measure cells in order until the time is up; rows of this engine are kept between cells."""
    ours: tuple[tuple[str, int, int], Rows] | None = None
    module: Any = None
    held = ""
    for cell in cells:
        about = {"cell": cell.name, "batch": cell.batch, "context": cell.context}
        with run.report.entry(cell.name, **about):
            run.deadline.check(CELL_S)
            if cell.model != held:
                ours = module = None
                model = run.model(cell.model)
                module, held = plain(model), cell.model
            key = (cell.model, cell.batch, cell.budget)
            if ours is None or ours[0] != key:
                ours = None
                run.free()
                ours = (key, Rows(model, cell.batch, cell.budget, graphs=True))
            _cell(run, cell, model, ours[1], module)


def _cell(run: Run, cell: Cell, model: LoadedModel, rows: Rows, module: Any) -> None:
    room = run.sizes.room
    chosen = policies(model, cell.budget, cell.context + room)
    variants = [_bounded(model, rows, name, chosen[name], cell) for name in BOUNDED]
    kept: dict[str, Any] = {}
    full = weight_bytes(model) + cell.batch * cell.context * token_bytes(model)

    def once(name: str, make: Callable[[], Any]) -> Callable[[], Any]:
        def opened() -> Any:
            if name not in kept:
                kept[name] = make()
            return kept[name]

        return opened

    def unbounded() -> Rows:
        return Rows(model, cell.batch, cell.context + room, graphs=True)

    def refilled() -> Rows:
        full_rows: Rows = once("full", unbounded)()
        full_rows.fill(chosen["full"], cell.context)
        return full_rows

    def dropped(rows: Any) -> None:
        rows.close()
        run.free()

    if "full" in cell.peers:
        seen = [cell.context] * cell.batch
        moved = weight_bytes(model) + kv_step_bytes(model, chosen["full"], seen)
        variants.append(Variant("full", refilled, lambda _: None, moved))
    if "dynamic" in cell.peers:
        dynamic = Variant(
            "dynamic", lambda: Dynamic(module, cell.batch, cell.context), dropped, full
        )
        variants.append(dynamic)
    if "batching" in cell.peers:
        # A separate module, because the manager may switch its attention.
        make = once("batching", lambda: Batching(plain(model), cell.batch, cell.context, room))
        variants.append(Variant("batching", make, lambda _: None, full))
    try:
        found = interleave(run, variants)
        attention = kept["batching"].attention if "batching" in kept else None
    finally:
        if "batching" in kept:
            kept["batching"].close()
        kept.clear()
        run.free()
    _report(run, cell, variants, found, attention)


def _bounded(
    model: LoadedModel, rows: Rows, name: str, policy: EffectivePolicy, cell: Cell
) -> Variant:
    def filled() -> Rows:
        rows.fill(policy, cell.context)
        return rows

    moved = weight_bytes(model) + kv_step_bytes(model, policy, [cell.context] * cell.batch)
    return Variant(name, filled, lambda _: None, moved)


def interleave(run: Run, variants: list[Variant]) -> dict[str, Measured]:
    """Alternate between the variants; a failure ends only the variant that failed."""
    found = {variant.name: Measured([]) for variant in variants}
    sizes = run.sizes
    for number in range(sizes.rounds):
        shift = number % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            mine = found[variant.name]
            if mine.failure is not None:
                continue
            try:
                run.deadline.check()
                stepping = variant.open()
                try:
                    mine.turns.append(turn(stepping.step, sizes.untimed, sizes.steps))
                    mine.kv_bytes = stepping.kv_bytes
                finally:
                    variant.close(stepping)
            except OutOfTime as up:
                # Measured turns count; a variant without any reports the lack of time.
                mine.failure = None if mine.turns else up
            except Exception as error:
                # The traceback's frames would hold memory that the other variants need.
                mine.failure = error.with_traceback(None)
                run.free()
    return found


def _report(
    run: Run,
    cell: Cell,
    variants: list[Variant],
    found: dict[str, Measured],
    attention: str | None,
) -> None:
    base = found.get(BASE)
    base_ms = figures(base.turns, 1)["ms_per_step"] if base and base.turns else None
    for variant in variants:
        mine = found[variant.name]
        about: dict[str, Any] = {
            "cell": cell.name,
            "model": cell.model,
            "context": cell.context,
            "batch": cell.batch,
            "budget": cell.budget if variant.name in BOUNDED else None,
            "variant": variant.name,
        }
        name = f"{cell.name}: {variant.name}"
        if not mine.turns:
            assert mine.failure is not None
            run.report.missed(name, mine.failure, **about)
            continue
        told_figures = figures(mine.turns, cell.batch)
        ms = told_figures["ms_per_step"]
        more: dict[str, Any] = {"turns": len(mine.turns)}
        if mine.failure is not None:
            more["ended_early"] = failure_entry(mine.failure)["reason"]
        if base_ms is not None:
            more["times_faster_than_transformers"] = round(base_ms / ms, 3)
        if run.bytes_per_s is not None:
            floor = 1e3 * variant.step_bytes / run.bytes_per_s
            more |= {"roofline_ms": round(floor, 4), "roofline_share": round(floor / ms, 3)}
        if variant.name in ("a2sf", "table") and found["window"].turns:
            more["price_of_scoring"] = price(mine.turns, found["window"].turns)
        if variant.name == "batching":
            more["attention"] = attention
        run.report.add(
            name,
            **about,
            **told_figures,
            step_bytes=variant.step_bytes,
            kv_bytes=mine.kv_bytes,
            **more,
        )


def price(scored: list[Turn], unscored: list[Turn]) -> dict[str, Any]:
    """By what share a scored step is longer than a step that evicts by position, turn by turn."""
    pairs = zip(scored, unscored, strict=False)
    return spread([sum(one) / sum(other) - 1 for one, other in pairs])
