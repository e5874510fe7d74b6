"""The check for near-ties accepts rounding, and detects faults."""

import dataclasses
import math

import pytest
import torch

from a2sf.engine import sampling
from a2sf.model.loader import LoadedModel
from a2sf.policy import CachePolicy
from a2sf.requests import GenerationRequest, Sampling
from tests.driving import GREEDY, engine_for, request
from tests.near_ties import Draw, Parting, Recorder, Step, parting


def test_a_fault_is_not_accepted_as_a_near_tie(tiny_model: LoadedModel) -> None:
    def steps(one: GenerationRequest) -> list[Step]:
        recorder = Recorder(engine_for(tiny_model, slots=128))
        recorder.engine.submit(one)
        while recorder.engine.has_work:
            recorder.step()
        return recorder.steps["r"]

    requested_policy = CachePolicy(alpha=0.9, budget=12, recent=3, prefill_chunk=8)
    draws = Sampling(seed=1)
    one = request("r", range(30), cache_policy=requested_policy, sampling=draws, max_new_tokens=30)
    right = steps(one)
    assert parting(right, steps(one)) is None
    forgetful = requested_policy.model_copy(update={"recent": 2})
    parted = parting(right, steps(one.model_copy(update={"cache_policy": forgetful})))
    assert parted is not None
    assert parted.kind == "eviction"
    assert parted.gap > 1e-3
    reseeded = draws.model_copy(update={"seed": 2})
    parted = parting(right, steps(one.model_copy(update={"sampling": reseeded})))
    assert parted == Parting("draw", 3, math.inf)


def test_a_near_tie_is_found_with_its_gap() -> None:
    def draw(*logits: float) -> Draw:
        row = sampling.SamplingState(sampling=GREEDY, seed=0)
        values = torch.tensor(logits)
        return Draw(int(values.argmax()), values, row)

    def kept(*positions: int, score: float) -> Step:
        scores = torch.tensor([[[1.0, score, 2.0]]])
        return Step(torch.tensor([[positions]]), scores, draw(0.0, 2.0))

    start = kept(0, 1, 2, score=0.5)
    near = parting([start, kept(0, 1, 3, score=0.5)], [start, kept(0, 2, 3, score=0.500001)])
    assert near is not None
    assert (near.kind, near.step) == ("eviction", 1)
    assert near.gap == pytest.approx(2e-6, rel=0.1)

    one = dataclasses.replace(start, draw=draw(2.0, 1.999))
    other = dataclasses.replace(start, draw=draw(1.999, 2.0))
    near = parting([start, one], [start, other])
    assert near is not None
    assert (near.kind, near.step) == ("draw", 1)
    assert near.gap == pytest.approx(2.5e-4, rel=0.1)
