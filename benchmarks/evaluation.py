"""Time a policy along given texts against plain teacher forcing.

Owns one measurement: seconds that a model takes for a batch of texts, with the full cache in one
forward pass, and with every token evicted for. Variants are interleaved, round after
round, and compared within the run.

    python -m benchmarks.evaluation [--model DIR] [--length 512] [--batch 32] [--out FILE]
"""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer

from a2sf import teacher
from a2sf.models import load_model
from a2sf.policy import CachePolicy
from a2sf.teacher import Example
from benchmarks import RESULTS, save
from tuner.objective import effective


def main(
    model_id: Annotated[
        str, typer.Option("--model", help="reference, a directory or a hub id.")
    ] = "reference",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float64.")] = "auto",
    length: Annotated[int, typer.Option(help="Tokens of every text.")] = 512,
    prompt: Annotated[int | None, typer.Option(help="Of these the prompt; None: half.")] = None,
    batch: Annotated[int, typer.Option(help="Texts at once.")] = 32,
    ratio: Annotated[float, typer.Option(help="Budget as a share of the length.")] = 0.2,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = os.cpu_count() or 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS
    / "evaluation-cpu.json",
) -> None:
    """Time policies along given texts, side by side, and write the figures."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = load_model(model_id, device=device, dtype=dtype)
    teacher.prepare(model)
    ids = torch.randint(2, model.shape.vocab_size, (batch, length)).tolist()
    prompt = prompt or length // 2
    counted = tuple(range(prompt, length - 1))
    examples = [Example(tuple(row), prompt, counted) for row in ids]
    wish = CachePolicy(alpha=0.9, budget_ratio=ratio, recent_share=0.5)
    step_by_step = effective(wish.model_copy(update={"prefill_chunk": 1}), model, length)
    exact = effective(wish, model, length)
    variants: dict[str, tuple[list[Any] | None, bool]] = {
        "plain teacher forcing": (None, False),
        "exact prefill, then step by step": ([exact] * batch, False),
        "step by step from the first token": ([step_by_step] * batch, False),
        "the same, attention rows compared": ([step_by_step] * batch, True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, (policies, similarity) in variants.items():
            start = time.perf_counter()
            teacher.predict(model, examples, policies, batch=batch, similarity=similarity)
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    base = float(numpy.median(times["plain teacher forcing"]))
    rows = []
    for name, taken in times.items():
        low, median, high = numpy.percentile(taken, [25, 50, 75]).tolist()
        rows.append(
            {
                "variant": name,
                "seconds_median": round(median, 3),
                "seconds_quartiles": [round(low, 3), round(high, 3)],
                "times_plain": round(median / base, 2),
            }
        )
        typer.echo(f"{name:36s} {median:7.2f} s  [{low:.2f}, {high:.2f}]  {median / base:5.2f}x")
    save(
        out,
        model,
        model=model.identity.id,
        length=length,
        prompt=prompt,
        batch=batch,
        budget_ratio=ratio,
        rounds=rounds,
        rows=rows,
    )


if __name__ == "__main__":
    typer.run(main)
