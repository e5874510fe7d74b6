"""A request gets the tokens of its solo run, whatever else the engine does."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from a2sf.errors import InvalidArgument, ResourceExhausted
from a2sf.model.loader import LoadedModel, load_model
from a2sf.policy import CachePolicy
from a2sf.requests import Delta, Event, Finished, FinishReason, GenerationRequest, Sampling, Started
from tests.driving import (
    STATES,
    any_requests,
    engine_for,
    finished,
    request,
    run,
    run_at_random,
    state,
    tokens,
)
from tests.near_ties import TOLERANCE, Parting, Recorder, parting

SIZES: dict[str, Any] = {"slots": 168, "max_batch": 5, "max_waiting": 1000, "step_tokens": 50}

SHAPED = SIZES | {"slots": 216, "head_share": ((1.0, 1.5), (2.0, 1.0), (1.0, 1.2))}
"""Rows with unequal heads; the narrowest head has as many slots as every head of `SIZES`."""

SHARE = {torch.float64: 0.0, torch.float32: 0.01, torch.bfloat16: 0.05}
"""Largest share of requests that may differ from their solo runs at near-ties."""


def alone(model: LoadedModel, one: GenerationRequest) -> list[Event]:
    engine = engine_for(model, **SIZES)
    engine.submit(one)
    return run(engine)[one.request_id]


def content(stream: list[Event]) -> list[object]:
    """The content of a stream without times, logprobs and the seed, which may be new."""
    parts: list[object] = []
    for event in stream:
        if isinstance(event, Finished):
            parts.append(event.model_dump(exclude={"timings"}))
        elif isinstance(event, Delta):
            parts.append((event.text, event.token_ids, len(event.logprobs)))
        else:
            parts.append(event.model_dump(exclude={"seed"}))
    return parts


def logprobs(stream: list[Event]) -> list[float]:
    deltas = [event for event in stream if isinstance(event, Delta)]
    return [one.logprob for event in deltas for one in event.logprobs]


def hold_to_the_promise(
    model: LoadedModel, count: int, seed: int, sizes: dict[str, Any] = SIZES
) -> list[Parting]:
    """Serve random requests together and alone; return the near-ties at which they differ.

    `sizes` are the sizes of the engine that serves them together.
    """
    made = any_requests(model, count, seed)
    rng = random.Random(seed)
    doomed = {one.request_id for one in rng.sample(made, count // 3)}
    exact = model.dtype is torch.float64
    together = Recorder(engine_for(model, **sizes))
    step = None if exact else together.step
    streams = run_at_random(together.engine, made, rng, cancel=doomed, step=step)
    partings: list[Parting] = []
    ends: Counter[object] = Counter()
    evicted = 0
    for one in made:
        name, stream = one.request_id, streams[one.request_id]
        cancelled = not stream or not isinstance(stream[-1], Finished)
        assert name in doomed or not cancelled
        ends[state(stream) if cancelled else finished(stream).reason] += 1
        # In float64 even the pieces of a prompt do not matter.
        pieces = {"step_tokens": 512} if exact else {}
        solo = Recorder(engine_for(model, **SIZES | pieces))
        solo.engine.submit(one)
        own: list[Event] = []
        while solo.engine.has_work:
            own += solo.engine.step() if exact else solo.step()
        evicted += finished(own).cache.evicted_tokens > 0
        if not exact:
            parted = parting(solo.steps[name], together.steps.get(name, []))
            if parted is not None:
                assert parted.gap <= TOLERANCE[model.dtype], f"request {name}: {parted}"
                partings.append(parted)
                continue
        # A cancelled request emits nothing more, but its earlier events are correct.
        parts, whole = content(stream), content(own)
        assert parts == (whole[: len(parts)] if cancelled else whole), f"request {name}"
        if exact:
            numbers = logprobs(stream)
            assert numbers == pytest.approx(logprobs(own)[: len(numbers)], abs=1e-10)
    assert {FinishReason.LENGTH, FinishReason.STOP, *STATES} <= set(ends), f"only {ends}"
    assert evicted > count // 3
    report = f"{len(partings)} of {count} requests part: {partings}"
    print(report)
    assert len(partings) <= math.ceil(SHARE[model.dtype] * count), report
    return partings


@pytest.fixture(scope="module")
def models(tiny_model_dir, tiny_model, tiny_model_64):  # type: ignore[no-untyped-def]
    return {
        "float64": tiny_model_64,
        "float32": tiny_model,
        "bfloat16": load_model(str(tiny_model_dir), device="cpu", dtype="bfloat16"),
    }


@pytest.mark.parametrize(("seed", "sizes"), [(1, SIZES), (2, SHAPED)], ids=["equal", "shaped"])
def test_a_request_gets_exactly_the_tokens_of_its_solo_run(
    tiny_model_64: LoadedModel, seed: int, sizes: dict[str, Any]
) -> None:
    assert hold_to_the_promise(tiny_model_64, 60, seed, sizes) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_below_float64_it_differs_from_its_solo_run_only_at_near_ties(
    models: dict[str, LoadedModel], dtype: str
) -> None:
    hold_to_the_promise(models[dtype], 60, seed=3, sizes=SHAPED)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("seed", [4, 5])
def test_hundreds_of_requests_get_the_tokens_of_their_solo_runs(
    models: dict[str, LoadedModel], dtype: str, seed: int
) -> None:
    hold_to_the_promise(models[dtype], 300, seed)


def test_every_step_advances_every_running_request(tiny_model: LoadedModel) -> None:
    engine = engine_for(tiny_model, **SIZES)
    made = {one.request_id: one for one in any_requests(tiny_model, 40, seed=6)}
    order = list(made)
    streams: dict[str, list[Event]] = {name: [] for name in made}
    blocks: Counter[str] = Counter()

    def step() -> list[Event]:
        ongoing = {n for n, s in streams.items() if s and not isinstance(s[-1], Finished)}
        running = {name for name in ongoing if tokens(streams[name])}
        assert engine.running == len(ongoing)
        admits = engine.waiting > 0 and ongoing == running and len(running) < 5
        events = engine.step()
        begun = [event.request_id for event in events if isinstance(event, Started)]
        assert begun == ([order.pop(0)] if admits else []), "the first in line is next"
        prefilling = (ongoing - running) | set(begun)
        with_token = [e.request_id for e in events if isinstance(e, Delta) and e.token_ids]
        assert len(with_token) == len(set(with_token))
        assert running <= set(with_token) <= running | prefilling
        for name in prefilling:
            blocks[name] += 1
        for event in events:
            streams[event.request_id].append(event)
        return events

    run_at_random(engine, made.values(), random.Random(6), step=step)
    for name, one in made.items():
        assert finished(streams[name])
        chunk = one.cache_policy.prefill_chunk or SIZES["step_tokens"]
        assert blocks[name] == math.ceil(len(one.prompt_ids) / chunk)


@pytest.mark.parametrize(("prefill_chunk", "served"), [(0, 8), (1, 0), (16, 7)])
def test_running_streams_get_a_token_in_every_step_while_long_prompts_wait(
    tiny_model: LoadedModel, prefill_chunk: int, served: int
) -> None:
    engine = engine_for(tiny_model, slots=128, max_batch=4)
    for name in ("one", "two"):
        engine.submit(request(name, (1, 2), max_new_tokens=100))
        engine.step()
    requested_policy = CachePolicy(preset="h2o", budget=32, prefill_chunk=prefill_chunk)
    for index in range(8):
        engine.submit(
            request(f"long {index}", range(120), max_new_tokens=4, cache_policy=requested_policy)
        )
    engine.step()
    got: Counter[str] = Counter()
    for _ in range(60):
        got.update(e.request_id for e in engine.step() if isinstance(e, Delta) and e.token_ids)
        assert got["one"] == got["two"]
    assert got["one"] == 60
    # One block per step: the queue advances as fast as without running streams.
    assert len(got) - 2 == served


def test_a_waiting_prompt_takes_the_first_free_row_and_advances_in_every_step(
    tiny_model: LoadedModel,
) -> None:
    engine = engine_for(tiny_model, max_batch=3)
    lengths = {"short": 10, "long": 60, "longer": 90}
    for name, length in lengths.items():
        engine.submit(request(name, (1, 2, 3), max_new_tokens=length))
    requested_policy = CachePolicy(preset="h2o", budget=24, prefill_chunk=16)
    engine.submit(request("late", range(50), cache_policy=requested_policy, max_new_tokens=5))
    seen: dict[str, list[int]] = {}
    for step in range(1, 40):
        for event in engine.step():
            kind = type(event).__name__
            seen.setdefault(f"{event.request_id} {kind}", []).append(step)
    assert seen["short Finished"] == [10]
    assert seen["late Started"] == [11]
    # Four blocks of 16 + 16 + 16 + 2 tokens; the last one gives the first token.
    assert seen["late Delta"] == [14, 15, 16, 17, 18]
    assert seen["longer Delta"] == list(range(3, 40))


@pytest.mark.parametrize("where", STATES)
def test_a_request_can_be_cancelled_in_every_state_and_its_id_reused(
    tiny_model_64: LoadedModel, where: str
) -> None:
    chunks = CachePolicy(preset="h2o", budget=20, prefill_chunk=4)
    one = request("r", range(60), cache_policy=chunks, max_new_tokens=30)
    other = request("other", range(20, 60), max_new_tokens=60, sampling=Sampling(seed=3))
    engine = engine_for(tiny_model_64, **SIZES | {"max_batch": 2})
    engine.submit(other)
    streams: dict[str, list[Event]] = {"r": [], "other": []}
    for _ in range(2):
        engine.submit(one)
        while state(streams["r"]) != where:
            for event in engine.step():
                streams[event.request_id].append(event)
        for _ in range(2):
            engine.cancel("r")
            assert engine.running == (where != "waiting" or bool(streams["other"]))
            assert engine.waiting == (not streams["other"])
        streams["r"] = []
    engine.submit(one)
    for name, stream in run(engine).items():
        streams[name] += stream
    assert content(streams["r"]) == content(alone(tiny_model_64, one))
    assert content(streams["other"]) == content(alone(tiny_model_64, other))
    engine.cancel("r")
    assert not engine.has_work
    engine.submit(one)
    assert content(run(engine)["r"]) == content(streams["r"])


def test_requests_may_be_submitted_while_the_events_of_a_step_are_read(
    tiny_model_64: LoadedModel,
) -> None:
    made = {one.request_id: one for one in any_requests(tiny_model_64, 12, seed=7)}
    order = iter(made.values())
    engine = engine_for(tiny_model_64, **SIZES | {"max_batch": 2})
    for _ in range(2):
        engine.submit(next(order))
    streams: dict[str, list[Event]] = {name: [] for name in made}
    while engine.has_work:
        for event in engine.step():
            streams[event.request_id].append(event)
            if isinstance(event, Finished):
                # Its id and its row are already free.
                engine.submit(made[event.request_id])
                engine.cancel(event.request_id)
                if (one := next(order, None)) is not None:
                    engine.submit(one)
    for name, one in made.items():
        assert content(streams[name]) == content(alone(tiny_model_64, one))


def test_equal_seeds_draw_equal_tokens_and_greedy_rows_use_no_random_numbers(
    tiny_model_64: LoadedModel,
) -> None:
    engine = engine_for(tiny_model_64, max_batch=4)
    for name, heat in (("warm", 1.0), ("cold", 0.0), ("as warm", 1.0), ("almost cold", 1e-31)):
        draws = Sampling(temperature=heat, seed=5)
        engine.submit(request(name, range(40), sampling=draws))
    streams = {name: tokens(stream) for name, stream in run(engine).items()}
    assert streams["warm"] == streams["as warm"]
    assert streams["cold"] == streams["almost cold"]
    assert streams["warm"] != streams["cold"]


def test_the_largest_budget_is_the_slab_s_slots(
    tiny_model_64: LoadedModel,
) -> None:
    engine = engine_for(tiny_model_64, slots=40, max_batch=2, default_policy=CachePolicy(alpha=1.0))
    whole = request("whole", range(15), cache_policy=CachePolicy(preset="full"), max_new_tokens=25)
    tight = request("tight", range(90), cache_policy=CachePolicy(preset="h2o", budget=40))
    for one in (whole, tight):
        engine.submit(one)
    with pytest.raises(InvalidArgument, match="at most 40 slots"):
        engine.submit(whole.model_copy(update={"request_id": "more", "max_new_tokens": 26}))
    streams = run(engine)
    assert finished(streams["tight"]).cache.kept_tokens == 40
    for one in (whole, tight):
        assert content(streams[one.request_id]) == content(alone(tiny_model_64, one))


def test_the_longest_exact_prompt_fills_the_staging_row(tiny_model_64: LoadedModel) -> None:
    engine = engine_for(tiny_model_64, max_prefill_tokens=40)
    chunked = CachePolicy(preset="h2o", budget=31, prefill_chunk=10)
    wider = chunked.model_copy(update={"prefill_chunk": 11})
    exact = CachePolicy(preset="h2o", budget=31)
    for requested_policy, prompt in ((chunked, range(200)), (exact, range(40))):
        one = request("r", prompt, cache_policy=requested_policy)
        engine.submit(one)
        assert content(run(engine)["r"]) == content(alone(tiny_model_64, one))
    for requested_policy, prompt in ((wider, range(200)), (exact, range(41))):
        with pytest.raises(InvalidArgument, match=r"need 41 staging slots.*prefill_chunk"):
            engine.submit(request("r", prompt, cache_policy=requested_policy))


def test_cancelling_a_waiting_request_frees_its_place_in_the_queue(
    tiny_model: LoadedModel,
) -> None:
    engine = engine_for(tiny_model, max_batch=1, max_waiting=1)
    for name in ("runs", "waits"):
        engine.submit(request(name, (1, 2)))
    engine.step()
    for place in ("waits", "runs"):
        with pytest.raises(ResourceExhausted):
            engine.submit(request("late", (1, 2)))
        engine.cancel(place)
        engine.submit(request(place, (1, 2)))
    assert set(run(engine)) == {"runs", "waits"}
