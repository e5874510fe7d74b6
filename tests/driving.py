"""Driving an engine in tests: requests, runs, and what came out of them."""

import random
from collections.abc import Iterable
from typing import Any

from a2sf.admission import EngineConfig
from a2sf.engine import Engine
from a2sf.models import LoadedModel
from a2sf.policy import CachePolicy
from a2sf.requests import Delta, Event, Finished, GenerationRequest, Sampling, Started
from tests.tables import make_table

GREEDY = Sampling(temperature=0.0)


def request(name: str, prompt: Iterable[int], **fields: Any) -> GenerationRequest:
    settings: dict[str, Any] = {
        "max_new_tokens": 20,
        "sampling": GREEDY,
        "ignore_eos": True,
        **fields,
    }
    return GenerationRequest(request_id=name, prompt_ids=tuple(prompt), **settings)


def run(engine: Engine, limit: int = 10_000) -> dict[str, list[Event]]:
    streams: dict[str, list[Event]] = {}
    for _ in range(limit):
        if not engine.has_work:
            return streams
        for event in engine.step():
            streams.setdefault(event.request_id, []).append(event)
    raise AssertionError("the engine never ran out of work")


def tokens(stream: list[Event]) -> list[int]:
    return [t for event in stream if isinstance(event, Delta) for t in event.token_ids]


def finished(stream: list[Event]) -> Finished:
    assert isinstance(stream[0], Started)
    assert isinstance(stream[-1], Finished)
    assert sum(isinstance(event, Started | Finished) for event in stream) == 2
    return stream[-1]


def engine_for(model: LoadedModel, **config: Any) -> Engine:
    settings = {
        "slots": 128,
        "max_batch": 3,
        "default_policy": CachePolicy(preset="h2o", budget=48),
        **config,
    }
    return Engine(model, EngineConfig(**settings))


def prompts(count: int, low: int = 1, high: int = 70, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(low, high))] for _ in range(count)]


def mixed_requests(model: LoadedModel, count: int, seed: int) -> list[GenerationRequest]:
    rng = random.Random(seed)
    table = make_table(model.identity)
    made = []
    for index, prompt in enumerate(prompts(count, high=60, seed=seed)):
        wish = rng.choice(
            [
                CachePolicy(table=table.name),
                CachePolicy(alpha=0.9, budget=20, recent=5, prefill_chunk=4),
                CachePolicy(preset="h2o", budget=32),
                CachePolicy(preset="window", budget=16),
                CachePolicy(preset="full"),
                CachePolicy(preset="random", budget=18, recent=3, random_seed=7),
            ]
        )
        made.append(
            request(
                str(index),
                prompt,
                cache_policy=wish,
                table=table if wish.table else None,
                max_new_tokens=rng.randint(1, 25),
                sampling=rng.choice(
                    [GREEDY, Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=index)]
                ),
            )
        )
    return made
