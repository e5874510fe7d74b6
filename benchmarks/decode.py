"""Time a decode step: this engine under several policies, and transformers with a growing cache.

Owns one measurement: milliseconds a decode step of a random Llama on this machine, after a prompt
of `--context` tokens, for `--batch` sequences at once. Variants are interleaved, round after round,
and compared within the run: on a noisy machine the ratios hold where absolute figures do not.

    python -m benchmarks.decode [--context 2048] [--budget 256] [--out FILE]
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from a2sf.admission import EngineConfig
from a2sf.engine import Engine
from a2sf.models import LoadedModel, load_model
from a2sf.policy import CachePolicy
from a2sf.reference import path as reference_path
from a2sf.requests import GenerationRequest, Sampling
from benchmarks import RESULTS, save

SHAPE = {
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 16384,
}


def random_llama(directory: Path) -> Path:
    """Write a random Llama of `SHAPE` that speaks the reference model's tokens."""
    reference = reference_path()
    vocabulary = json.loads((reference / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **SHAPE)).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((reference / name).read_bytes())
    return directory


def engine_step(
    model: LoadedModel, policy: CachePolicy, prompt: list[int], batch: int, steps: int
) -> Callable[[], None]:
    """Return a decode step of our engine, with `batch` rows already prefilled."""
    slots = len(prompt) + steps + 1 if policy.preset == "full" else (policy.budget or 0)
    engine = Engine(model, EngineConfig(slots=slots, max_batch=batch, default_policy=policy))
    for row in range(batch):
        engine.submit(
            GenerationRequest(
                request_id=str(row),
                prompt_ids=tuple(prompt),
                max_new_tokens=steps + 1 if policy.preset == "full" else 10_000,
                ignore_eos=True,
                sampling=Sampling(temperature=0.0),
            )
        )
    while engine.waiting or engine.running < batch:
        engine.step()
    engine.step()

    def step() -> None:
        engine.step()

    return step


def transformers_step(module: Any, prompt: list[int], batch: int) -> Callable[[], None]:
    """Return a greedy decode step of transformers with its dynamic cache."""
    with torch.inference_mode():
        output = module(torch.tensor([prompt] * batch), use_cache=True, logits_to_keep=1)
    state = {"cache": output.past_key_values, "token": output.logits[:, -1].argmax(-1)[:, None]}

    def step() -> None:
        with torch.inference_mode():
            output = module(state["token"], past_key_values=state["cache"], use_cache=True)
            state["token"] = output.logits[:, -1].argmax(-1)[:, None]

    return step


def main(
    context: Annotated[int, typer.Option(help="Prompt tokens of every sequence.")] = 2048,
    budget: Annotated[int, typer.Option(help="Slots a row keeps, in tokens.")] = 256,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    steps: Annotated[int, typer.Option(help="Decode steps a round.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "decode-cpu.json",
) -> None:
    """Time a decode step, side by side, and write the figures with machine and versions."""
    torch.set_num_threads(threads)
    batches = batch or [1, 4]
    total = rounds * steps
    policies = {
        "a2sf": CachePolicy(alpha=0.9, budget=budget, recent=budget // 8),
        "h2o": CachePolicy(preset="h2o", budget=budget),
        "window": CachePolicy(preset="window", budget=budget),
        "full": CachePolicy(preset="full"),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        directory = random_llama(Path(work))
        model = load_model(str(directory), device="cpu", dtype="float32")
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        prompt = torch.randint(0, model.shape.vocab_size, (context,)).tolist()
        for size in batches:
            variants = {
                name: engine_step(model, policy, prompt, size, total + 2)
                for name, policy in policies.items()
            }
            variants["transformers dynamic cache"] = transformers_step(plain, prompt, size)
            times: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(rounds):
                for name, step in variants.items():
                    for _ in range(steps):
                        start = time.perf_counter()
                        step()
                        times[name].append((time.perf_counter() - start) * 1e3)
            base = statistics.median(times["transformers dynamic cache"])
            for name, taken in times.items():
                low, median, high = numpy.percentile(taken, [25, 50, 75]).tolist()
                rows.append(
                    {
                        "batch": size,
                        "variant": name,
                        "ms_per_step_median": round(median, 3),
                        "ms_per_step_quartiles": [round(low, 3), round(high, 3)],
                        "times_faster_than_transformers": round(base / median, 2),
                    }
                )
                typer.echo(
                    f"batch {size:2d}  {name:28s} {median:8.2f} ms  "
                    f"[{low:.2f}, {high:.2f}]  {base / median:5.2f}x"
                )
    save(
        out,
        model,
        model={**SHAPE, "dtype": "float32", "weights": "random"},
        context=context,
        budget=budget,
        rounds=rounds,
        steps_per_round=steps,
        rows=rows,
    )


if __name__ == "__main__":
    typer.run(main)
