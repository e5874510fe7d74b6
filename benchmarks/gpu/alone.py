"""Measures the cost of this engine's steps, and how many rows fit.

The costs: with and without graphs, by length, and in Python. Only the count of concurrent sequences
has a peer for comparison. Knows nothing of prompts.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy
import torch

from a2sf.cache.slots import SLOT_OVERHEAD_BYTES
from a2sf.engine.config import EngineConfig
from benchmarks.gpu.filling import Rows, policies
from benchmarks.gpu.models import plain, token_bytes
from benchmarks.gpu.peers import Dynamic
from benchmarks.gpu.run import Run
from benchmarks.gpu.timing import Turn, figures, spread, turn
from benchmarks.peers.loop import Filling
from benchmarks.peers.worker_ours import PREFILL_CHUNK, CopyingEngine, fill_rows, policy

RESERVE_SHARE = 0.08
"""Share of the free memory reserved for what a step allocates besides the cache."""

TRIED = 8
"""Steps that must succeed for a number of rows to count as fitting."""


def graphs(run: Run) -> None:
    """Compare steps captured in graphs with steps launched one by one, at one row and at many."""
    model = run.model("8b")
    sizes = run.sizes
    for batch in sorted({1, sizes.batch}):
        with run.report.entry(f"graphs at batch {batch}"):
            run.deadline.check()
            chosen = policies(model, sizes.budget, sizes.prompt + 1)["a2sf"]
            both = {on: Rows(model, batch, sizes.budget, graphs=on) for on in (True, False)}
            turns: dict[bool, list[Turn]] = {True: [], False: []}
            for number in range(sizes.rounds):
                for which in (True, False) if number % 2 else (False, True):
                    both[which].fill(chosen, sizes.prompt)
                    turns[which].append(turn(both[which].step, sizes.untimed, sizes.steps))
            on, off = (figures(turns[which], batch) for which in (True, False))
            run.report.add(
                f"graphs at batch {batch}",
                batch=batch,
                budget=sizes.budget,
                kernels=both[True].kernels,
                with_graphs=on,
                without_graphs=off,
                times_faster_with_graphs=round(off["ms_per_step"] / on["ms_per_step"], 3),
            )
        run.free()


def lengths(run: Run) -> None:
    """Time steps of rows that have read few tokens and of rows that have read very many."""
    model = run.model("8b")
    sizes = run.sizes
    batch = min(8, sizes.batch)
    rows = Rows(model, batch, sizes.budget, graphs=True)
    chosen = policies(model, sizes.budget, max(sizes.lengths) + 1)["a2sf"]
    turns: dict[int, list[Turn]] = {seen: [] for seen in sizes.lengths}
    for _ in range(sizes.rounds):
        for seen in sizes.lengths:
            run.deadline.check()
            rows.fill(chosen, seen)
            turns[seen].append(turn(rows.step, sizes.untimed, sizes.steps))
    found = {seen: figures(taken, batch) for seen, taken in turns.items()}
    steps = [found[seen]["ms_per_step"] for seen in sizes.lengths]
    slope, at_0 = numpy.polyfit(sizes.lengths, steps, 1)
    run.report.add(
        "step time against the tokens seen",
        batch=batch,
        budget=sizes.budget,
        by_length={str(seen): one for seen, one in found.items()},
        slope_ms_per_100k_tokens=round(float(slope) * 1e5, 4),
        slope_share_of_step=round(float(slope) * 1e5 / float(at_0), 4),
    )


def host(run: Run) -> None:
    """Compare the engine's whole step, including events, with the decoder's on the same rows."""
    model = run.model("8b")
    sizes = run.sizes
    batch = sizes.batch
    room = 2 * sizes.rounds * (sizes.untimed + sizes.steps) + 4
    prompt = [2 + at % (model.shape.vocab_size - 2) for at in range(sizes.budget + PREFILL_CHUNK)]
    if run.dry:
        prompt = prompt[: sizes.prompt]
    engine = CopyingEngine(
        model,
        EngineConfig(
            slots=sizes.budget,
            max_batch=batch,
            max_prefill_tokens=len(prompt),
            default_policy=policy("a2sf", sizes.budget),
        ),
    )
    filling = Filling(prompt=prompt, batch=batch, budget=sizes.budget, turn=1, room=room)
    fill_rows(engine, filling)

    def bare() -> None:
        active = engine._active
        logits = engine._decoder.step(
            [s.generated[-1] for s in active], [s.num_cached_tokens for s in active]
        )
        for sequence, token in zip(active, logits.argmax(dim=-1).tolist(), strict=True):
            sequence.generated.append(token)

    sides: dict[str, Callable[[], object]] = {"engine": engine.step, "decoder": bare}
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for number in range(sizes.rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            run.deadline.check()
            turns[name].append(turn(sides[name], sizes.untimed, sizes.steps))
    found = {name: figures(taken, batch) for name, taken in turns.items()}
    gap = [
        sum(one) / len(one) - sum(other) / len(other)
        for one, other in zip(turns["engine"], turns["decoder"], strict=True)
    ]
    run.report.add(
        f"what Python costs at batch {batch}",
        batch=batch,
        budget=sizes.budget,
        engine_step=found["engine"],
        decoder_step=found["decoder"],
        host_ms=spread(gap),
    )


def concurrency(run: Run) -> None:
    """Count the most sequences of the longest context that decode together: ours, transformers'."""
    model = run.model("8b")
    module: Any = plain(model)
    sizes = run.sizes
    context, room = sizes.most_context, sizes.untimed + TRIED + 1
    chosen = policies(model, sizes.budget, context + room)["a2sf"]

    def ours(rows: int) -> Turn:
        made = Rows(model, rows, sizes.budget, graphs=True)
        made.fill(chosen, context)
        return turn(made.step, sizes.untimed, TRIED)

    def dynamic(rows: int) -> Turn:
        return turn(Dynamic(module, rows, context).step, sizes.untimed, TRIED)

    # Positions and scores in the slab; and one float32 logit per slot and query head as scratch,
    # once for each batch size with a graph: at most three times the largest.
    per_slot = model.shape.num_kv_heads * SLOT_OVERHEAD_BYTES * model.shape.num_layers
    per_slot += 3 * 4 * model.shape.num_attention_heads
    mine = sizes.budget * (token_bytes(model) + per_slot)
    theirs = (context + room) * token_bytes(model)
    counts = {}
    for name, row_bytes, attempt in (("a2sf", mine, ours), ("dynamic", theirs, dynamic)):
        with run.report.entry(f"most sequences of {context} tokens: {name}"):
            began = time.monotonic()
            rows, taken = _most(run, row_bytes, attempt)
            counts[name] = rows
            run.report.add(
                f"most sequences of {context} tokens: {name}",
                variant=name,
                context=context,
                budget=sizes.budget if name == "a2sf" else None,
                rows=rows,
                row_bytes=row_bytes,
                **figures([taken], rows),
                took_s=round(time.monotonic() - began, 1),
            )
    if len(counts) == 2:
        run.report.add(
            "times as many sequences as transformers",
            context=context,
            times=round(counts["a2sf"] / counts["dynamic"], 2),
        )


def _most(run: Run, row_bytes: int, attempt: Callable[[int], Turn]) -> tuple[int, Turn]:
    """Try as many rows as the free memory should hold; after each failure, an eighth fewer."""
    run.free()
    rows = run.sizes.ceiling
    if run.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(run.device)
        rows = min(int(free * (1 - RESERVE_SHARE)) // row_bytes, rows)
    while True:
        run.deadline.check()
        if rows < 1:
            raise MemoryError(f"not one row of {row_bytes / 1e9:.2f} GB fits")
        try:
            return rows, attempt(rows)
        except torch.OutOfMemoryError:
            rows = rows * 7 // 8
        run.free()
