"""Times a long prompt: the cost of scoring in one layer's attention, and the prefill of a model.

This engine reads the prompt under several alphas, and transformers reads it too. Knows nothing of
decode steps except the first token, at which a prefill ends.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from a2sf.cache import scoring
from a2sf.engine import decoding
from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.model.loader import LoadedModel
from a2sf.policy import CachePolicy
from a2sf.requests import Delta, GenerationRequest, Sampling
from benchmarks.gpu.models import plain
from benchmarks.gpu.report import OutOfTime
from benchmarks.gpu.run import Run
from benchmarks.gpu.timing import device_ms, spread

ALPHAS = (0.0, 0.9, 0.99, 1.0)
REPEATS = 5

LONG_STEP = 8192
"""Prompt tokens per step when no other stream waits for a token."""


def attention(run: Run) -> None:
    """Time one layer's attention over a whole prompt, with and without the scores of its tokens.

    At alpha 1 every query counts, so scoring needs as many multiplications as the attention itself.
    """
    model = run.model("8b")
    shape, length = model.shape, run.sizes.prompt
    rng = torch.Generator(run.device).manual_seed(0)

    def vectors(heads: int) -> Tensor:
        size = (1, heads, length, shape.head_dim)
        return torch.randn(size, dtype=model.dtype, device=run.device, generator=rng)

    query, keys, values = (
        vectors(n) for n in (shape.num_attention_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    at = torch.arange(length, device=run.device)[None]
    position = at.int()[:, None].expand(1, shape.num_kv_heads, length).contiguous()
    scale = shape.head_dim**-0.5
    attend = decoding.block_attention(decoding.choose_kernels("auto", model))
    plain_ms = device_ms(
        lambda: scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        ),
        run.device,
        REPEATS,
    )
    name = f"one layer's attention over {length} tokens"
    run.report.add(f"{name}: plain", variant="plain", **_ms(plain_ms, shape.num_layers))
    base = spread(plain_ms)["median"]
    for alpha in ALPHAS:
        with run.report.entry(f"{name}: scored, alpha {alpha:g}"):
            run.deadline.check()
            factors = torch.full(
                (1, 1, shape.num_kv_heads), alpha, dtype=torch.float64, device=run.device
            )
            lengths = torch.tensor([length], device=run.device)
            weights = scoring.query_weights(factors, lengths, 0, length)[0]
            first = int((weights > 0).any(dim=1)[0].int().argmax())
            call = partial(attend, query, at, keys, values, position, weights[:, :, first:], scale)
            times = device_ms(partial(call, in_order=True), run.device, REPEATS)
            run.report.add(
                f"{name}: scored, alpha {alpha:g}",
                variant=f"a2sf {alpha:g}",
                queries_that_count=length - first,
                times_plain=round(spread(times)["median"] / base, 3),
                **_ms(times, shape.num_layers),
            )


def _ms(times: list[float], layers: int) -> dict[str, Any]:
    found = spread(times)
    return {
        "ms": found["median"],
        "ms_quartiles": found["quartiles"],
        "ms_all_layers": round(found["median"] * layers, 3),
    }


def whole(run: Run) -> None:
    """Time a prompt to its first token under several policies, alternating with transformers."""
    model = run.model("8b")
    module = plain(model)
    sizes = run.sizes
    ids = prompt_ids(model, sizes.prompt)
    budget = sizes.budget
    policies_by_name = {
        "window, exact": CachePolicy(preset="window", budget=budget),
        "a2sf .9, exact": CachePolicy(alpha=0.9, budget=budget),
        "a2sf .99, exact": CachePolicy(alpha=0.99, budget=budget),
        "h2o (alpha 1, all queries count), exact": CachePolicy(preset="h2o", budget=budget),
        f"a2sf .9, chunks of {sizes.chunk}": CachePolicy(
            alpha=0.9, budget=budget, prefill_chunk=sizes.chunk
        ),
    }
    variants: dict[str, Callable[[], float]] = {
        "transformers": partial(transformers_prefill, module, ids, run.device)
    }
    for name, requested_policy in policies_by_name.items():
        step = LONG_STEP if not requested_policy.prefill_chunk else sizes.chunk
        variants[name] = partial(engine_prefill, model, requested_policy, ids, step)
    taken: dict[str, list[float]] = {name: [] for name in variants}
    failed: dict[str, Exception] = {}
    for number in range(sizes.rounds):
        for name in sorted(variants, reverse=bool(number % 2)):
            if name in failed:
                continue
            try:
                # The longest takes several seconds, and cannot be interrupted.
                run.deadline.check(max(taken[name], default=0.0))
                taken[name].append(variants[name]())
            except OutOfTime as up:
                if not taken[name]:
                    failed[name] = up
            except Exception as error:
                failed[name] = error.with_traceback(None)
            run.free()
    base = taken["transformers"]
    for name in variants:
        title = f"prompt of {sizes.prompt} tokens: {name}"
        if not taken[name]:
            run.report.missed(title, failed[name], variant=name)
            continue
        found = spread(taken[name])
        faster = spread(base)["median"] / found["median"] if base else None
        run.report.add(
            title,
            variant=name,
            seconds_median=found["median"],
            seconds_quartiles=found["quartiles"],
            tokens_per_s=round(sizes.prompt / found["median"], 1),
            times_faster_than_transformers=faster and round(faster, 3),
        )


def prompt_ids(model: LoadedModel, length: int) -> list[int]:
    """A deterministic prompt of token ids."""
    return [2 + (at * 7919) % (model.shape.vocab_size - 2) for at in range(length)]


def engine_for_prompt(
    model: LoadedModel, requested_policy: CachePolicy, length: int, step_tokens: int, rows: int = 1
) -> Engine:
    """Make an engine whose staging row has exactly the size that the prompt needs."""
    slots = requested_policy.budget or length + 2
    needed = (
        length
        if not requested_policy.prefill_chunk
        else min(length, slots - 1 + requested_policy.prefill_chunk)
    )
    return Engine(
        model,
        EngineConfig(
            slots=slots,
            max_batch=rows,
            max_prefill_tokens=needed,
            step_tokens=step_tokens,
            default_policy=requested_policy,
        ),
    )


def engine_prefill(
    model: LoadedModel, requested_policy: CachePolicy, ids: list[int], step_tokens: int
) -> float:
    """Seconds from a prompt to its first token, without the construction of the engine."""
    engine = engine_for_prompt(model, requested_policy, len(ids), step_tokens)
    engine.submit(greedy("r", ids, 2))
    began = time.perf_counter()
    while not any(isinstance(event, Delta) for event in engine.step()):
        pass
    return time.perf_counter() - began


def transformers_prefill(module: Any, ids: list[int], device: torch.device) -> float:
    """The same in transformers: one forward pass with a cache, and the first token."""
    tensor = torch.tensor([ids], device=device)
    began = time.perf_counter()
    with torch.inference_mode():
        module(tensor, use_cache=True, logits_to_keep=1).logits[:, -1].argmax().item()
    return time.perf_counter() - began


def greedy(name: str, ids: list[int], new_tokens: int) -> GenerationRequest:
    """A greedy request for this many tokens, whatever the end-of-sequence token."""
    return GenerationRequest(
        request_id=name,
        prompt_ids=tuple(ids),
        max_new_tokens=new_tokens,
        ignore_eos=True,
        sampling=Sampling(temperature=0.0),
    )
