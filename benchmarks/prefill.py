"""Times the prefill of a prompt: this engine under several policies, and transformers.

Owns one measurement: seconds from a prompt to its first token on the random Llama of the grid, the
longest step among them (the time that a running stream waits), and how the time of a chunked
prefill grows with the prompt. Variants alternate, round after round, and are compared within the
run.

    python -m benchmarks.prefill [--context 2000 --context 8000] [--dtype float32] [--out FILE]
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer
from transformers import AutoModelForCausalLM

from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.model.loader import LoadedModel, load_model
from a2sf.policy import CachePolicy
from a2sf.requests import Delta, GenerationRequest, Sampling
from benchmarks import RESULTS, save
from benchmarks.peers.models import prepare, prompt

EXACT_AT_MOST = 8000
"""Above this number of tokens only chunked prefill is timed, because the time of all others grows
with the square of the prompt."""

Timing = tuple[float, float]
"""Seconds of the prefill, and of its longest step."""


def engine_prefill(model: LoadedModel, requested_policy: CachePolicy, ids: list[int]) -> Timing:
    """Prefill one prompt in a new engine."""
    config = EngineConfig(
        slots=requested_policy.budget or 1,
        max_batch=1,
        max_prefill_tokens=len(ids),
        default_policy=requested_policy,
    )
    engine = Engine(model, config)
    engine.submit(
        GenerationRequest(
            request_id="r",
            prompt_ids=tuple(ids),
            max_new_tokens=2,
            ignore_eos=True,
            sampling=Sampling(temperature=0.0),
        )
    )
    steps = []
    drawn = False
    while not drawn:
        start = time.perf_counter()
        drawn = any(isinstance(event, Delta) for event in engine.step())
        steps.append(time.perf_counter() - start)
    return sum(steps), max(steps)


def transformers_prefill(module: Any, ids: list[int]) -> Timing:
    """Prefill one prompt with the dynamic cache, in one forward pass."""
    start = time.perf_counter()
    with torch.inference_mode():
        module(torch.tensor([ids]), use_cache=True, logits_to_keep=1).logits[:, -1].argmax()
    taken = time.perf_counter() - start
    return taken, taken


def main(
    context: Annotated[list[int] | None, typer.Option(help="Prompt tokens.")] = None,
    budget: Annotated[int, typer.Option(help="Slots that the row keeps.")] = 512,
    chunk: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 256,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="File of the JSON.")] = RESULTS / "prefill-cpu.json",
) -> None:
    """Time prompts, in turns, and write the figures with machine and versions."""
    torch.set_num_threads(threads)
    directory = prepare("random", Path("build/peers"))
    model = load_model(str(directory), device="cpu", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    exact = {
        "window, exact": CachePolicy(preset="window", budget=budget),
        "a2sf .9, exact": CachePolicy(alpha=0.9, budget=budget),
        "a2sf .99, exact": CachePolicy(alpha=0.99, budget=budget),
        "h2o, exact": CachePolicy(preset="h2o", budget=budget),
    }
    chunked = {
        f"{name}, chunks of {chunk}": CachePolicy(alpha=alpha, budget=budget, prefill_chunk=chunk)
        for name, alpha in (("a2sf .9", 0.9), ("a2sf .99", 0.99))
    }
    cells: dict[tuple[int, str], Callable[[], Timing]] = {}
    for length in context or [2000, 8000, 16000]:
        ids = prompt(model.shape.vocab_size, length)
        if length <= EXACT_AT_MOST:
            cells[length, "transformers"] = partial(transformers_prefill, plain, ids)
        policies_by_name = {**exact, **chunked} if length <= EXACT_AT_MOST else chunked
        for name, requested_policy in policies_by_name.items():
            cells[length, name] = partial(engine_prefill, model, requested_policy, ids)
    taken: dict[tuple[int, str], list[Timing]] = {cell: [] for cell in cells}
    for _ in range(rounds):
        for cell, measure in cells.items():
            taken[cell].append(measure())
    medians = {cell: float(numpy.median([t for t, _ in times])) for cell, times in taken.items()}
    rows = []
    for (length, name), times in taken.items():
        median = medians[length, name]
        base = medians.get((length, "transformers"))
        half = medians.get((length // 2, name))
        rows.append(
            {
                "context": length,
                "variant": name,
                "seconds_median": round(median, 3),
                "seconds": [round(t, 3) for t, _ in times],
                "longest_step_s": round(max(step for _, step in times), 3),
                "times_faster_than_transformers": base and round(base / median, 2),
                "times_half_the_context": half and round(median / half, 2),
            }
        )
        beside = f"{base / median:5.2f}x" if base else "      "
        growth = f"  {median / half:.2f} times half the prompt" if half else ""
        typer.echo(
            f"{length:6d}  {name:28s} {median:7.2f} s  longest step {rows[-1]['longest_step_s']}"
            f" s  {beside}{growth}"
        )
    save(
        out,
        model,
        model="random, as in the grid",
        dtype=dtype,
        budget=budget,
        rounds=rounds,
        step_tokens=EngineConfig.model_fields["step_tokens"].default,
        rows=rows,
    )


if __name__ == "__main__":
    typer.run(main)
