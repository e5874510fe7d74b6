"""The engine's memory is fixed before the first token and does not grow for any request."""

import multiprocessing
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from a2sf.engine.engine import Engine
from a2sf.model.loader import LoadedModel, load_model
from a2sf.policy import CachePolicy
from a2sf.requests import Finished, Sampling
from tests.driving import any_requests, engine_for, finished, prompts, request, run
from tests.tables import make_table
from tests.tiny import BYTES, save_tiny_llama

MIB = 2**20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("rows", "slots"), [(1, 7), (3, 50), (8, 168)])
def test_the_cache_always_takes_the_bytes_of_the_formula(
    tiny_model_dir: Path, dtype: str, rows: int, slots: int
) -> None:
    model = load_model(str(tiny_model_dir), device="cpu", dtype=dtype)
    shape = model.shape
    staging = 90
    engine = engine_for(
        model,
        slots=slots,
        max_batch=rows,
        max_prefill_tokens=staging,
        default_policy=CachePolicy(preset="h2o", budget=slots),
    )
    slot_bytes = 2 * shape.head_dim * model.dtype.itemsize + 8
    token_bytes = shape.num_layers * shape.num_kv_heads * slot_bytes

    def check() -> None:
        assert engine.kv_slab_bytes == rows * slots * token_bytes
        assert engine.kv_staging_bytes == staging * token_bytes

    check()
    rng = random.Random(slots)
    for index, prompt in enumerate(prompts(3 * rows, high=staging)):
        requested_policy = CachePolicy(preset="h2o", budget=rng.randint(5, slots))
        engine.submit(request(str(index), prompt, cache_policy=requested_policy, max_new_tokens=12))
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Finished):
                assert event.cache.kept_tokens <= event.cache.budget
                assert event.cache.kv_bytes == event.cache.kept_tokens * token_bytes
        check()
    check()


@pytest.mark.parametrize(
    "shares",
    [
        ((2.5, 2.5), (1.0, 1.0), (1.0, 1.0)),
        ((0.6, 0.3), (1.0, 2.0), (7.7, 0.4)),
        ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0)),
    ],
)
@pytest.mark.parametrize(("rows", "slots"), [(1, 31), (3, 50)])
def test_a_shaped_slab_takes_the_same_bytes_as_an_equal_one(
    tiny_model: LoadedModel, rows: int, slots: int, shares: tuple[tuple[float, ...], ...]
) -> None:
    shape = tiny_model.shape
    sizes = {"slots": slots, "max_batch": rows, "default_policy": CachePolicy(alpha=1.0)}
    flat = engine_for(tiny_model, **sizes)
    shaped = engine_for(tiny_model, **sizes, head_share=shares)
    heads = shaped.config.head_slots(shape.num_layers, shape.num_kv_heads)
    vector_bytes = 2 * shape.head_dim * tiny_model.dtype.itemsize
    slab_bytes = rows * sum(map(sum, heads)) * (vector_bytes + 8)
    assert shaped.kv_slab_bytes == flat.kv_slab_bytes == slab_bytes
    assert shaped.kv_staging_bytes == flat.kv_staging_bytes

    assert sum(map(sum, heads)) == 3 * shape.num_kv_heads * slots
    table = make_table(tiny_model.identity, head_share=shares, recent=0, sinks=0)
    requested_policy = CachePolicy(table=table.name, budget=slots)
    shaped.submit(request("r", range(200), table=table, cache_policy=requested_policy))
    cache = finished(run(shaped)["r"]).cache
    assert (cache.budget, cache.kept_tokens) == (slots, slots)
    assert cache.kept_tokens + cache.evicted_tokens == 219
    assert cache.kv_bytes == 3 * slots * shape.num_kv_heads * (vector_bytes + 8)
    assert shaped.kv_slab_bytes == slab_bytes


def test_kept_tokens_are_averaged_over_heads_and_rounded(tiny_model: LoadedModel) -> None:
    table = make_table(tiny_model.identity, layer_share=(4.0, 1.0, 1.0))
    requested_policy = CachePolicy(table=table.name, budget=20)
    # Budgets of 40, 10 and 10: after 19 tokens, the heads hold 19 + 10 + 10.
    engine = engine_for(tiny_model)
    engine.submit(
        request("r", range(10), max_new_tokens=10, table=table, cache_policy=requested_policy)
    )
    cache = finished(run(engine)["r"]).cache
    assert (cache.kept_tokens, cache.evicted_tokens) == (19, 0)
    engine.submit(
        request("r", range(15), max_new_tokens=15, table=table, cache_policy=requested_policy)
    )
    cache = finished(run(engine)["r"]).cache
    # With at most 30 tokens the budgets are 30, 15 and 15; the heads hold 29 + 15 + 15.
    assert (cache.kept_tokens, cache.evicted_tokens) == (20, 9)
    assert cache.kv_bytes == 59 * 2 * (2 * 8 * 4 + 8)


def test_a_prompt_that_ends_early_reports_its_bytes_in_the_staging_row(
    tiny_model: LoadedModel,
) -> None:
    now = 0.0
    config = engine_for(tiny_model, slots=48, step_tokens=64).config
    engine = Engine(tiny_model, config, clock=lambda: now)
    engine.submit(request("r", [7] * 300, time_limit_s=5.0))
    for _ in range(3):
        engine.step()
    now = 5.0
    (end,) = engine.step()
    assert isinstance(end, Finished)
    assert end.cache.kept_tokens == 192
    assert end.cache.kv_bytes == 192 * 3 * 2 * (2 * 8 * 4 + 8)


def in_a_fresh_process(measure: Callable[..., list[float]], *arguments: Any) -> list[float]:
    """Run `measure` in a separate process, where nothing else takes memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        return processes.submit(measure, *arguments).result()


def make_model(context: int, **sizes: int) -> LoadedModel:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        save_tiny_llama(Path(directory), max_position_embeddings=context, **sizes)
        return load_model(directory, device="cpu", dtype="float32")


def resident() -> float:
    return psutil.Process().memory_info().rss / MIB


def along_one_long_request(every: int, count: int) -> list[float]:
    """Resident MiB after each of `count` times `every` tokens of one request."""
    model = make_model(every * count + 100)
    engine = engine_for(model, max_prefill_tokens=100)
    requested_policy = CachePolicy(preset="h2o", budget=64)
    sampling = Sampling(seed=1, top_p=0.9, repetition_penalty=1.1)
    engine.submit(
        request(
            "r",
            range(100),
            max_new_tokens=every * count,
            cache_policy=requested_policy,
            sampling=sampling,
        )
    )
    measured = []
    for _ in range(count):
        for _ in range(every):
            engine.step()
        measured.append(resident())
    assert not engine.has_work
    return measured


def along_many_requests(every: int, count: int) -> list[float]:
    """Resident MiB after each of `count` times `every` requests with random arrivals."""
    model = make_model(512)
    engine = engine_for(model, slots=168, max_batch=5)
    rng = random.Random(0)
    made = any_requests(model, every * count, seed=0, max_len=60)[::-1]
    measured = []
    while made or engine.has_work:
        while made and engine.waiting < 3 and rng.random() < 0.5:
            one = made.pop()
            engine.submit(one)
            if rng.random() < 0.2:
                engine.cancel(str(rng.randrange(every * count)))
            if len(made) % every == 0:
                measured.append(resident())
        engine.step()
    return measured


def peak_over_a_prompt(length: int) -> list[float]:
    """Peak MiB above idle while a prompt of this many tokens is served in chunks."""
    model = make_model(17_000, hidden_size=128, intermediate_size=256, head_dim=32)
    engine = engine_for(model, slots=512, max_batch=1, max_prefill_tokens=1024)
    requested_policy = CachePolicy(preset="h2o", budget=512, prefill_chunk=256)
    rng = random.Random(0)
    prompt = [rng.randrange(BYTES) for _ in range(length)]
    engine.submit(request("r", prompt, max_new_tokens=10, cache_policy=requested_policy))
    # Reset the kernel's high-water mark of resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    idle = resident()
    run(engine)
    status = Path("/proc/self/status").read_text().split()
    return [int(status[status.index("VmHWM:") + 1]) / 1024 - idle]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_resident_memory_does_not_grow_over_ten_thousand_tokens() -> None:
    measured = in_a_fresh_process(along_one_long_request, 1000, 11)
    # A full cache would take 4 MiB; we measured 0.45, which includes the list of tokens.
    assert measured[-1] - measured[0] < 1.0, f"MiB after each 1,000 tokens: {measured}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_resident_memory_does_not_grow_over_hundreds_of_requests() -> None:
    measured = in_a_fresh_process(along_many_requests, 20, 16)
    # The first requests also fill the caches of libraries, so growth counts from the 180th on.
    assert measured[-1] - measured[8] < 1.0, f"MiB after each 20 requests: {measured}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_peak_memory_of_a_chunked_prompt_does_not_depend_on_its_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system cannot reset a process's peak memory")
    # Otherwise the allocator keeps a varying amount of freed memory.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    (short,) = in_a_fresh_process(peak_over_a_prompt, 2_000)
    (long,) = in_a_fresh_process(peak_over_a_prompt, 16_000)
    # We measured 12.1 to 12.3 and 12.3 to 12.4. In an exact prefill, the long prompt's cache alone
    # would take 24.
    assert long < 1.15 * short, (
        f"{short:.1f} MiB above idle for 2,000 tokens, {long:.1f} for 16,000"
    )
