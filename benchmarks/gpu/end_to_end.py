"""Times requests to their last token: measured for a long prompt, extrapolated for a long answer.

Extrapolated figures say so in their names, and are computed only from prefills and steps of this
run.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from a2sf.policy import CachePolicy
from a2sf.requests import Delta
from benchmarks.gpu.filling import Rows, policies
from benchmarks.gpu.models import plain
from benchmarks.gpu.peers import Dynamic
from benchmarks.gpu.prefill import (
    LONG_STEP,
    engine_for_prompt,
    engine_prefill,
    greedy,
    prompt_ids,
    transformers_prefill,
)
from benchmarks.gpu.report import Deadline
from benchmarks.gpu.run import Run
from benchmarks.gpu.timing import turn

ROWS = 2
"""Rows of the measured comparison."""

POINTS = 4
"""Number of lengths, from the prompt's end to the answer's end, at which transformers' steps are
timed."""


@dataclass
class Arrivals:
    """Seconds after the start at which each step's tokens arrived."""

    times: list[float] = field(default_factory=list)

    def figures(self, rows: int) -> dict[str, Any]:
        """Return the total time, the first token's, and those of the steps after it."""
        steps = 1e3 * numpy.diff(self.times)
        middle, p99 = numpy.percentile(steps, [50, 99]).tolist() if len(steps) else (0.0, 0.0)
        return {
            "tokens_a_row": len(self.times),
            "seconds": round(self.times[-1], 3),
            "first_token_s": round(self.times[0], 3),
            "ms_per_token_p50": round(middle, 3),
            "ms_per_token_p99": round(p99, 3),
            "tokens_per_s": round(rows * len(self.times) / self.times[-1], 2),
        }


def long_prompt(run: Run) -> None:
    """Read a long prompt and write an answer, in this engine and by transformers' `generate`.

    If the time ends first, the answer stops early on both sides, and its name includes the number
    of tokens.
    """
    model = run.model("8b")
    sizes = run.sizes
    ids = prompt_ids(model, sizes.prompt)
    # Ours gets a third of the time. It should be faster, so transformers gets more time, and its
    # answer may even be longer.
    ours = _ours(run, ids, run.deadline.within(run.deadline.left / 3))
    _add(run, "ours, a2sf .9", ours)
    run.free()
    theirs = _generate(run, plain(model), ids)
    _add(run, "transformers generate", theirs)
    count = min(len(ours.times), len(theirs.times))
    if count:
        run.report.add(
            f"{sizes.prompt} tokens in, {count} out, {ROWS} rows: times faster than transformers",
            times=round(theirs.times[count - 1] / ours.times[count - 1], 3),
        )


def _add(run: Run, variant: str, found: Arrivals) -> None:
    name = f"{run.sizes.prompt} tokens in, {len(found.times)} out, {ROWS} rows, measured: {variant}"
    run.report.add(name, variant=variant, **found.figures(ROWS))


def _ours(run: Run, ids: list[int], deadline: Deadline) -> Arrivals:
    sizes = run.sizes
    requested_policy = CachePolicy(alpha=0.9, budget=sizes.budget, recent=sizes.budget // 8)
    engine = engine_for_prompt(run.model("8b"), requested_policy, len(ids), LONG_STEP, ROWS)
    for row in range(ROWS):
        engine.submit(greedy(str(row), ids, sizes.new_tokens))
    seen: dict[str, list[float]] = {str(row): [] for row in range(ROWS)}
    began = time.perf_counter()
    while engine.has_work and deadline.left > 0:
        for event in engine.step():
            if isinstance(event, Delta):
                seen[event.request_id].append(time.perf_counter() - began)
    # A token counts once every row has it.
    return Arrivals([max(at) for at in zip(*seen.values(), strict=False)])


class _Watch:
    """A streamer of `generate`: records arrivals of tokens, and ends the call in time."""

    def __init__(self, deadline: Deadline) -> None:
        self.found = Arrivals()
        self._deadline = deadline
        self._prompt_seen = False
        self._began = time.perf_counter()

    def put(self, value: Any) -> None:
        """Called with the prompt first, then with each step's tokens, on the host."""
        if self._prompt_seen:
            self.found.times.append(time.perf_counter() - self._began)
        self._prompt_seen = True

    def end(self) -> None:
        """Called when `generate` ends."""

    def __call__(self, ids: Any, scores: Any, **rest: Any) -> Any:
        """As a stopping criterion: whether each row is done."""
        return torch.full((len(ids),), self._deadline.left <= 0, device=ids.device)


def _generate(run: Run, module: Any, ids: list[int]) -> Arrivals:
    prompt = torch.tensor([ids] * ROWS, device=run.device)
    watch = _Watch(run.deadline)
    with torch.inference_mode():
        module.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=run.sizes.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=watch,
            stopping_criteria=[watch],
        )
    return watch.found


def long_answer(run: Run) -> None:
    """Extrapolate a long answer from a measured prefill and steps measured at a few lengths."""
    model = run.model("8b")
    module = plain(model)
    sizes = run.sizes
    first, last = sizes.short_prompt, sizes.short_prompt + sizes.long_answer
    lengths = [round(at) for at in numpy.linspace(first, last, POINTS)]
    ids = prompt_ids(model, first)
    requested_policy = CachePolicy(alpha=0.9, budget=sizes.budget, recent=sizes.budget // 8)
    rows = Rows(model, 1, sizes.budget, graphs=True)
    chosen = policies(model, sizes.budget, last + 1)["a2sf"]
    steps: dict[str, list[float]] = {"ours, a2sf .9": [], "transformers": []}
    for length in lengths:
        run.deadline.check()
        rows.fill(chosen, length)
        steps["ours, a2sf .9"].append(_median(turn(rows.step, sizes.untimed, sizes.steps)))
        dynamic = Dynamic(module, 1, length)
        steps["transformers"].append(_median(turn(dynamic.step, sizes.untimed, sizes.steps)))
        del dynamic
        run.free()
    # The first of each is a warm-up and is not counted.
    prefills = {
        "ours, a2sf .9": [
            engine_prefill(model, requested_policy, ids, LONG_STEP) for _ in range(3)
        ][1:],
        "transformers": [transformers_prefill(module, ids, run.device) for _ in range(3)][1:],
    }
    totals = {}
    for name, taken in steps.items():
        decode_s = float(numpy.trapezoid(taken, lengths)) / 1e3
        totals[name] = min(prefills[name]) + decode_s
        run.report.add(
            f"{first} tokens in, {sizes.long_answer} out, one row, EXTRAPOLATED from steps at "
            f"{POINTS} lengths: {name}",
            variant=name,
            extrapolated=True,
            seconds=round(totals[name], 2),
            prefill_s=round(min(prefills[name]), 4),
            ms_per_step_at=dict(zip(map(str, lengths), [round(t, 4) for t in taken], strict=True)),
        )
    run.report.add(
        f"{first} tokens in, {sizes.long_answer} out, one row, EXTRAPOLATED: times faster than "
        "transformers",
        extrapolated=True,
        times=round(totals["transformers"] / totals["ours, a2sf .9"], 3),
    )


def _median(times: list[float]) -> float:
    return float(numpy.median(times))
