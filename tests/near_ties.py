"""Finds where two runs of one request first differ, and how close the decision was.

Rounding depends on the shape of a batch. So below float64 two runs may differ if two choices are
almost equal: which of two tokens a head evicts, or which token is drawn. After the first difference
the runs may differ freely, but the first difference must be a near-tie.
"""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from a2sf.cache.scoring import EMPTY
from a2sf.engine import sampling
from a2sf.engine.config import Kernels
from a2sf.engine.engine import Engine
from a2sf.model.loader import LoadedModel
from a2sf.requests import Delta, StepEvent
from tests.driving import any_requests, engine_for, rows_of, run_at_random, tokens

TOLERANCE = {
    torch.float64: 0.0,
    # 84 times its epsilon.
    torch.float32: 1e-5,
    # 16 times its epsilon: logits are rounded to 8 bits, and a score is a sum of their powers.
    torch.bfloat16: 16 * torch.finfo(torch.bfloat16).eps,
}
"""Largest relative gap of a near-tie, by the model's dtype."""


@dataclass(frozen=True)
class Draw:
    """A drawn token, and everything that it was drawn from."""

    token: int
    logits: Tensor
    """[vocab]."""
    state: sampling.SamplingState
    """The state before the draw."""

    def again(self, logits: Tensor) -> int:
        """The token that the same settings, random numbers and history draw from other logits."""
        (token,) = sampling.Batch([_copy(self.state)], logits.device).draw(logits[None])
        assert token is not None, "the logits are finite"
        return token


@dataclass
class Step:
    """The tokens that a request held after one step of the engine, and its draw in that step."""

    position: Tensor
    """[layers, H_kv, tokens], in order; `EMPTY` at the end of layers that keep fewer."""
    score: Tensor
    """[layers, H_kv, tokens]."""
    draw: Draw | None = None

    def scores(self, layer: int, head: int) -> dict[int, float]:
        """The score of each position that a head holds."""
        places = self.position[layer, head].tolist()
        scores = self.score[layer, head].tolist()
        return {p: score for p, score in zip(places, scores, strict=True) if p != EMPTY}


@dataclass(frozen=True)
class Parting:
    """The first place where two runs of a request differ."""

    kind: Literal["eviction", "draw"]
    step: int
    gap: float
    """Relative gap of the scores of tokens that differ, or of the logits to another draw."""


class Recorder:
    """Steps an engine, and records the tokens that every request holds and draws."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: dict[str, list[Step]] = {}
        """For each request, one entry per step of the engine from its admission on."""

    def step(self) -> list[StepEvent]:
        noted: dict[str, Step] = {}
        draws: list[Draw] = []
        draw_really = sampling.Batch.draw

        def draw(batch: sampling.Batch, logits: Tensor) -> list[int | None]:
            # Rows that end with this draw are free after the step.
            noted.update(self._held())
            states = [_copy(state) for state in batch._states]
            tokens = draw_really(batch, logits)
            for token, drawn_from, state in zip(
                tokens, logits.detach().clone(), states, strict=True
            ):
                assert token is not None, "the logits are finite"
                draws.append(Draw(token, drawn_from, state))
            return tokens

        with patch.object(sampling.Batch, "draw", draw):
            events = self.engine.step()
        noted.update(self._held())
        drawing = [event for event in events if isinstance(event, Delta) and event.token_ids]
        for event, drawn in zip(drawing, draws, strict=True):
            assert event.token_ids == (drawn.token,)
            noted[event.request_id].draw = drawn
        for name, one in noted.items():
            self.steps.setdefault(name, []).append(one)
        return events

    def _held(self) -> dict[str, Step]:
        return {name: Step(*kept) for name, kept in rows_of(self.engine).items()}


def parting(alone: list[Step], together: list[Step]) -> Parting | None:
    """Find where two runs of a request first differ, up to the shorter one; None if never."""
    for index, (one, other) in enumerate(zip(alone, together, strict=False)):
        before = (alone[index - 1], together[index - 1]) if index else None
        gap = _eviction_gap(one, other, before)
        if gap is not None:
            return Parting("eviction", index, gap)
        assert (one.draw is None) == (other.draw is None), "one run draws where the other does not"
        if one.draw and other.draw and one.draw.token != other.draw.token:
            return Parting("draw", index, _draw_gap(one.draw, other.draw))
    return None


def _eviction_gap(one: Step, other: Step, before: tuple[Step, Step] | None) -> float | None:
    if torch.equal(one.position, other.position):
        return None
    for layer in range(len(one.position)):
        gaps = [
            gap
            for head in range(one.position.shape[1])
            if (gap := _gap_in_head(one, other, before, layer, head)) is not None
        ]
        # Later layers depend on this one, so they may differ too.
        if gaps:
            return max(gaps)
    return float("inf")


def _gap_in_head(
    one: Step, other: Step, before: tuple[Step, Step] | None, layer: int, head: int
) -> float | None:
    mine, theirs = one.scores(layer, head), other.scores(layer, head)
    if mine.keys() == theirs.keys():
        return None
    if len(mine) != len(theirs):
        return float("inf")
    parted = mine.keys() ^ theirs.keys()
    # Decided after the step, by a prompt's last trim: each run has the scores of its own tokens.
    gap = _spread([(mine | theirs)[position] for position in parted])
    if before is not None:
        # Or decided before the step, among the tokens that both runs held then.
        held = [step.scores(layer, head) for step in before]
        if all(position in scores for position in parted for scores in held):
            gap = min(gap, _spread([scores[p] for p in parted for scores in held]))
    return gap


def _spread(values: list[float]) -> float:
    low, high = min(values), max(values)
    return (high - low) / high if high > 0 else 0.0


def _draw_gap(one: Draw, other: Draw) -> float:
    """The smallest move of one run's logits towards the other's that changes the drawn token.

    Relative to the largest logit. Infinite if the logits do not explain the other token: then the
    random numbers or the row's state are wrong.
    """
    if one.again(one.logits) != one.token or one.again(other.logits) != other.token:
        return float("inf")
    start, end = one.logits.double(), other.logits.double()
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if one.again(start + middle * (end - start)) == one.token:
            low = middle
        else:
            high = middle
    return high * float((end - start).abs().max() / start.abs().max())


def _copy(state: sampling.SamplingState) -> sampling.SamplingState:
    seen = None if state.seen is None else state.seen.clone()
    return dataclasses.replace(state, seen=seen)


SIZES: dict[str, Any] = {"slots": 168, "max_batch": 3, "max_waiting": 1000, "step_tokens": 20}
"""The sizes of the compared engines."""


def check_against_torch(
    model: LoadedModel, kernels: Kernels, count: int, seed: int, *, most: int
) -> int:
    """Check that requests with random arrivals equal their solo runs in torch.

    Returns the number of requests that evicted. Fails if a run differs without a near-tie.
    """
    made = any_requests(model, count, seed=seed, max_len=45, most=most)
    together = Recorder(engine_for(model, kernels=kernels, **SIZES))
    assert together.engine.kernels == kernels
    streams = run_at_random(
        together.engine, made, random.Random(seed), cancel=["0"], step=together.step
    )
    evicted = 0
    for one in made:
        alone = Recorder(engine_for(model, kernels="torch", **SIZES))
        alone.engine.submit(one)
        own: list[StepEvent] = []
        while alone.engine.has_work:
            own += alone.step()
        name = one.request_id
        parted = parting(alone.steps[name], together.steps.get(name, []))
        if parted is not None:
            assert parted.gap <= TOLERANCE[model.dtype], f"request {name}: {parted}"
            continue
        said, whole = tokens(streams[name]), tokens(own)
        assert said == whole[: len(said)]
        assert said == whole or name == "0"
        evicted += len(one.prompt_ids) + len(whole) > 20
    return evicted
