"""Measures the tuner's evaluation on a large model, and estimates the time of a whole fit.

A few decode steps are timed and scaled to a whole sequence. The time of the fit is an estimate, and
is named so: trials times evaluations. These are data for improvements, not a promise. Knows nothing
of searching.
"""

import time
from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy

from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from benchmarks.gpu.filling import policies
from benchmarks.gpu.prefill import prompt_ids
from benchmarks.gpu.report import NotSupported
from benchmarks.gpu.run import Run

COUNTED = 16
"""Positions of an example whose predictions are computed: few, because of the memory of their
logits."""

PROMPT_SHARE = 2
"""One part in this many of a sequence is prompt, run in blocks; the rest is decoded in steps."""


def measure(run: Run) -> None:
    """Time the teacher's pass and a policy's, and scale them to an evaluation and a fit."""
    model = run.model("8b")
    sizes = run.sizes
    tokens, rows = sizes.sequence_tokens, sizes.sequences
    few, more = sizes.continuation
    prompt = tokens // PROMPT_SHARE
    chosen = policies(model, sizes.budget, tokens)["table"]
    batch = rows

    def timed(action: Callable[[], object]) -> float:
        run.wait()
        began = time.perf_counter()
        action()
        run.wait()
        return time.perf_counter() - began

    def teach(length: int) -> float:
        examples = _examples(model, rows, length, length)
        return timed(lambda: teacher_forcing.predict(model, examples, None, batch=batch))

    def follow(steps: int) -> float:
        examples = _examples(model, rows, prompt + steps, prompt)
        wanted = [chosen] * rows
        return timed(lambda: teacher_forcing.predict(model, examples, wanted, batch=batch))

    teach(tokens)
    run.deadline.check()
    full_s = teach(tokens)
    follow(few)
    run.deadline.check()
    few_s, more_s = follow(few), follow(more)
    per_step = max(more_s - few_s, 0.0) / (more - few)
    blocks_s = max(more_s - per_step * more, 0.0)
    steps = tokens - prompt
    evaluation_s = blocks_s + per_step * steps
    heads = model.shape.num_layers * model.shape.num_kv_heads
    run.report.add(
        f"an evaluation of {rows} sequences of {tokens} tokens, SCALED from {few} and {more} steps",
        scaled=True,
        teacher_pass_s=round(full_s, 3),
        policy_pass_s_at_few_steps=round(few_s, 3),
        policy_pass_s_at_more_steps=round(more_s, 3),
        seconds_a_step=round(per_step, 5),
        blocks_s=round(blocks_s, 3),
        evaluation_s=round(evaluation_s, 2),
        share_of_steps=round(per_step * steps / evaluation_s, 3),
        share_of_blocks=round(blocks_s / evaluation_s, 3),
    )
    trials = _default_trials()
    hours = (full_s + trials * evaluation_s) / 3600
    run.report.add(
        f"a whole fit of {heads} KV heads at {trials} trials, ESTIMATED: evaluations of all "
        "examples through all layers, none given up early",
        scaled=True,
        trials=trials,
        evaluations_at_most=trials,
        hours_at_most=round(hours, 2),
        teacher_share=round(full_s / (3600 * hours), 5),
        times_faster_for_an_hour=round(hours, 2),
    )


def _examples(model: LoadedModel, rows: int, length: int, prompt: int) -> list[Example]:
    ids = prompt_ids(model, length + rows)
    counted = numpy.linspace(0, length - 2, min(COUNTED, length - 1)).astype(int)
    return [
        Example(
            token_ids=tuple(ids[row : row + length]),
            prompt_tokens=prompt,
            counted=tuple(counted.tolist()),
        )
        for row in range(rows)
    ]


def _default_trials() -> int:
    """The default number of trials of a fit."""
    try:
        from tuner.cli import fit
    except ImportError as missing:
        raise NotSupported(f"the tuner's packages are not installed here: {missing}") from missing
    options: Any = signature(fit).parameters
    return int(options["trials"].default)
