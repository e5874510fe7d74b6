"""Driving an engine in tests: requests, runs, and what came out of them."""

import itertools
import random
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from a2sf.cache.budgets import resolve
from a2sf.cache.scoring import EMPTY
from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.model.loader import LoadedModel
from a2sf.policy import PRESETS, CachePolicy, EffectivePolicy
from a2sf.requests import Delta, Finished, GenerationRequest, Sampling, Started, StepEvent
from tests.head_slots import head_of
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


def effective(model: LoadedModel, requested_policy: CachePolicy, length: int) -> EffectivePolicy:
    """The policy in plain numbers of a sequence of `length` tokens, with slots for all of them."""
    return resolve(
        requested_policy,
        table=None,
        server=CachePolicy(),
        length=length,
        slots=length,
        num_layers=model.shape.num_layers,
        num_kv_heads=model.shape.num_kv_heads,
    )


def run(engine: Engine, limit: int = 10_000) -> dict[str, list[StepEvent]]:
    streams: dict[str, list[StepEvent]] = {}
    for _ in range(limit):
        if not engine.has_work:
            return streams
        for event in engine.step():
            streams.setdefault(event.request_id, []).append(event)
    raise AssertionError("the engine never ran out of work")


def tokens(stream: Sequence[StepEvent]) -> list[int]:
    return [t for event in stream if isinstance(event, Delta) for t in event.token_ids]


def finished(stream: Sequence[StepEvent]) -> Finished:
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


def any_policy(rng: random.Random, length: int) -> CachePolicy:
    """A policy of any kind for prompt + max_new of `length`, from one slot to more than enough."""
    kind = rng.choice(["table", "alpha", *PRESETS])
    chunk = rng.choice([0, 0, 1, 3, 16, 16])
    if kind == "full":
        return CachePolicy(preset="full", prefill_chunk=chunk)
    sinks, recent = rng.choice([0, 1, 4]), rng.choice([0, 3, 8])
    least = sinks + recent + 1
    wide = rng.choice([least, rng.randint(least, 40), rng.randint(least, 80), length + 5])
    fields: dict[str, Any] = {
        "budget": max(least, wide),
        "sinks": sinks,
        "recent": None if kind in ("h2o", "window") else recent,
        "prefill_chunk": chunk,
    }
    if kind == "table":
        # Of shares from 1 to 2 the least gets more than half the mean.
        fields["budget"] = max(2 * least + 1, wide)
        return CachePolicy(table="made-up", **fields)
    if kind == "alpha":
        return CachePolicy(alpha=rng.choice([0.0, 0.5, 0.9, 0.99, 1.0]), **fields)
    if kind == "random":
        fields["random_seed"] = rng.randrange(2**31)
    return CachePolicy(**fields | {"preset": kind})


def any_sampling(rng: random.Random) -> Sampling:
    """Greedy or seeded, with any of the filters."""
    penalty = rng.choice([1.0, 1.0, 1.3])
    if rng.random() < 0.4:
        return Sampling(temperature=0.0, repetition_penalty=penalty, seed=0)
    return Sampling(
        repetition_penalty=penalty,
        temperature=rng.choice([0.3, 0.8, 1.5]),
        top_k=rng.choice([0, 5, 40]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        seed=rng.randrange(2**63),
    )


def any_requests(
    model: LoadedModel, count: int, seed: int, *, max_len: int = 120, most: int = 40
) -> list[GenerationRequest]:
    """Requests of every kind: policies, lengths, draws and ends as different as they may be."""
    rng = random.Random(seed)
    made = []
    for index, prompt in enumerate(prompts(count, high=max_len, seed=seed)):
        max_new = rng.randint(1, most)
        requested_policy = any_policy(rng, len(prompt) + max_new)
        alpha = [
            tuple(rng.choice([0.0, 0.5, 0.99, 1.0]) for _ in range(model.shape.num_kv_heads))
            for _ in range(model.shape.num_layers)
        ]
        shares = tuple(tuple(rng.choice([1.0, 1.3, 2.0]) for _ in row) for row in alpha)
        table = make_table(model.identity, alpha=tuple(alpha), head_share=shares)
        made.append(
            request(
                str(index),
                prompt,
                cache_policy=requested_policy,
                table=table if requested_policy.table else None,
                max_new_tokens=max_new,
                min_new_tokens=rng.choice([0, 0, rng.randint(0, max_new)]),
                sampling=any_sampling(rng),
                stop=tuple(
                    # The longer ones never come, but their first characters are held back.
                    character + rng.choice(["", "\0\0"])
                    for character in rng.sample(string.printable, rng.choice([0, 0, 6, 12]))
                ),
                stop_token_ids=tuple(rng.sample(range(256), rng.choice([0, 0, 4]))),
                ignore_eos=rng.random() < 0.7,
                logprobs=rng.random() < 0.2,
            )
        )
    return made


def rows_of(engine: Engine) -> dict[str, tuple[Tensor, Tensor]]:
    """What the requests in the engine store: positions and scores, [layers, H_kv, tokens] each.

    Copies in order of position, of the rows that decode and the one being prefilled; heads that
    keep fewer tokens end in empty ones. The one place in the tests that looks inside the engine.
    """
    rows = [(sequence, engine._slab, row) for row, sequence in enumerate(engine._active)]
    if engine._prefilling is not None:
        rows.append((engine._prefilling, engine._staging.row, 0))
    kept = {}
    for sequence, slots, row in rows:
        budgets = engine.model.select_heads(sequence.policy.head_budgets)
        heads = [
            [head_of(slots, layer, row, head) for head in range(len(budgets[layer]))]
            for layer in range(len(budgets))
        ]
        widest = max(len(one.position) for layer in heads for one in layer)
        shape = (len(heads), len(heads[0]), widest)
        position = torch.full(shape, EMPTY, dtype=torch.int32, device=slots.position.device)
        score = torch.zeros(shape, device=slots.position.device)
        for layer, head in itertools.product(*map(range, shape[:2])):
            one = heads[layer][head]
            position[layer, head, : len(one.position)] = one.position
            score[layer, head, : len(one.score)] = one.score
        position, order = position.sort(dim=-1)
        counts = (position != EMPTY).sum(dim=-1)
        count = int(counts.max())
        own = torch.tensor(budgets, device=counts.device)
        assert slots is engine._staging.row or bool((counts <= own).all())
        score = score.gather(-1, order)
        kept[sequence.request.request_id] = (position[..., :count], score[..., :count])
    return kept


STATES = ("waiting", "prefilling", "running")


def state(stream: Sequence[StepEvent]) -> str:
    """Where a submitted request is that has not ended, by what its stream has said so far."""
    if not stream:
        return "waiting"
    return "running" if tokens(stream) else "prefilling"


def run_at_random(
    engine: Engine,
    made: Iterable[GenerationRequest],
    rng: random.Random,
    *,
    cancel: Iterable[str] = (),
    step: Callable[[], list[StepEvent]] | None = None,
) -> dict[str, list[StepEvent]]:
    """Submit and cancel at random between steps until all is done; return each stream.

    Args:
        engine: idle.
        made: what to submit, in this order.
        rng: decides when.
        cancel: names to cancel, in any of the states, unless they end before.
        step: stands in for the engine's.
    """
    left = list(made)[::-1]
    streams: dict[str, list[StepEvent]] = {one.request_id: [] for one in left}
    doomed = {name: rng.choice(STATES) for name in sorted(cancel)}
    while left or engine.has_work:
        # A queue now and then, but not of all.
        while left and rng.random() < 0.5 and engine.waiting < 4:
            engine.submit(left.pop())
        waiting = {one.request_id for one in left}
        for name in sorted(doomed.keys() - waiting):
            there = STATES.index(state(streams[name])) >= STATES.index(doomed[name])
            if there and rng.random() < 0.5:
                engine.cancel(name)
                del doomed[name]
        for event in (step or engine.step)():
            streams[event.request_id].append(event)
    return streams
