"""An engine in which a chosen function raises while it works for one request.

Owns the requests, the functions (`CALLS`), and how each is made to raise.
"""

from collections.abc import Callable
from typing import Any

import pytest

import a2sf.engine.staging
from a2sf.cache.passes import BlockPass
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Rectangle, Slots
from a2sf.engine import sampling
from a2sf.engine.decoding import SteppedDecoder
from a2sf.engine.engine import Engine
from a2sf.engine.sequence import Sequence
from a2sf.engine.staging import Staging
from a2sf.model.loader import LoadedModel
from a2sf.policy import CachePolicy
from a2sf.requests import GenerationRequest, Sampling, StepEvent
from a2sf.text.detokenizer import TextStream
from tests.driving import engine_for, prompts, request

TEXTS = prompts(6, low=30, high=40, seed=4)


TOP = 7
"""A number of alternatives that only the victim asks for; it identifies its logprobs."""


class Panic(BaseException):
    """Like a panic in tokenizers' Rust code: not an Exception."""


def victim(**fields: Any) -> GenerationRequest:
    settings: dict[str, Any] = {
        "cache_policy": CachePolicy(alpha=0.9, budget=12, recent=2, prefill_chunk=8),
        "sampling": Sampling(seed=5),
        "max_new_tokens": 6,
        "logprobs": True,
        "top_logprobs": TOP,
        **fields,
    }
    return request("victim", TEXTS[0], **settings)


NEIGHBOURS = [
    request("short", TEXTS[1], max_new_tokens=9, cache_policy=CachePolicy(preset="h2o", budget=20)),
    request("long", TEXTS[2], max_new_tokens=30, sampling=Sampling(seed=9, top_p=0.9)),
]


LATER = [
    request(f"later {i}", text, max_new_tokens=8, logprobs=True, cache_policy=requested_policy)
    for i, (text, requested_policy) in enumerate(
        zip(
            TEXTS[3:],
            (
                CachePolicy(preset="full"),
                CachePolicy(alpha=0.5, budget=9, prefill_chunk=5),
                CachePolicy(preset="window", budget=16, prefill_chunk=1),
            ),
            strict=True,
        )
    )
]


class Clock:
    """A clock that advances one second per step."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Trial:
    """An engine in which a chosen function raises when it works for the victim."""

    def __init__(self, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        config = engine_for(model).config
        self.engine = Engine(model, config, clock=self.clock)
        self.patch = monkeypatch
        self.raised = 0
        self.patched_decoding = False
        """Whether the engine decodes all rows now, rather than prefilling a prompt."""

    @property
    def sequence(self) -> Sequence | None:
        found = (s for s in self.engine._sequences() if s.request.request_id == "victim")
        return next(found, None)

    def break_(
        self, owner: Any, name: str, concerns: Callable[..., bool], *, after: bool = False
    ) -> None:
        """Make a function raise, at its start or its end, when it works for the victim."""
        really = getattr(owner, name)
        prop = isinstance(really, property)
        function = really.fget if prop else really

        def broken(*arguments: Any, **named: Any) -> Any:
            hit = concerns(*arguments, **named)
            if hit and not after:
                self.raised += 1
                raise Panic(name)
            result = function(*arguments, **named)
            if hit:
                self.raised += 1
                raise Panic(name)
            return result

        self.patch.setattr(owner, name, property(broken) if prop else broken)

    def run(self) -> dict[str, list[StepEvent]]:
        streams: dict[str, list[StepEvent]] = {}
        while self.engine.has_work:
            self.clock.now += 1.0
            for event in self.engine.step():
                streams.setdefault(event.request_id, []).append(event)
        return streams


def of_sequence(sequence: Sequence, *_: Any) -> bool:
    return sequence.request.request_id == "victim"


Break = Callable[[Trial], None]


def method(name: str) -> Break:
    return lambda trial: trial.break_(Sequence, name, of_sequence)


def of_text(name: str) -> Break:
    def install(trial: Trial) -> None:
        trial.break_(
            TextStream,
            name,
            lambda text, *_: (s := trial.sequence) is not None and s.text is text,
        )

    return install


def of_batch(name: str) -> Break:
    def install(trial: Trial) -> None:
        def concerns(batch: sampling.Batch, rows: Any, *_: Any) -> bool:
            mine = rows if name == "__init__" else batch._states
            return trial.sequence is not None and trial.sequence.sampling_state in mine

        trial.break_(sampling.Batch, name, concerns)

    return install


def while_prefilling(owner: Any, name: str, *, after: bool = False) -> Break:
    """For functions that do not know their request, but run only during a prefill."""

    def install(trial: Trial) -> None:
        def concerns(*_: Any, **__: Any) -> bool:
            read = trial.engine._prefilling
            return read is not None and read is trial.sequence and not trial.patched_decoding

        trial.break_(owner, name, concerns, after=after)

    return install


def of_one(owner: type, name: str, *, after: bool = False) -> Break:
    def concerns(_: Any, sequence: Sequence, *__: Any) -> bool:
        return sequence.request.request_id == "victim"

    return lambda trial: trial.break_(owner, name, concerns, after=after)


def of_join(trial: Trial, *, after: bool) -> None:
    def concerns(decoder: Any, row: int, source: Any, *_: Any) -> bool:
        return trial.engine._prefilling is trial.sequence

    trial.break_(SteppedDecoder, "join", concerns, after=after)


def of_move(trial: Trial, *, after: bool) -> None:
    def concerns(decoder: Any, row: int, source: int) -> bool:
        return trial.engine._active[source] is trial.sequence

    trial.break_(SteppedDecoder, "move", concerns, after=after)


CALLS: dict[str, Break] = {
    "Sequence.overdue": method("overdue"),
    "Sequence.started": method("started"),
    "Sequence.accept": method("accept"),
    "Sequence.finished": method("finished"),
    "Sequence.time_out": method("time_out"),
    "Sequence.block": method("block"),
    "Sequence.in_order": method("in_order"),
    "TextStream.push": of_text("push"),
    "TextStream.flush": of_text("flush"),
    "SamplingState.note": lambda trial: trial.break_(
        sampling.SamplingState,
        "note",
        lambda row, *_: trial.sequence is not None and trial.sequence.sampling_state is row,
    ),
    "Batch.__init__": of_batch("__init__"),
    "Batch.draw": of_batch("draw"),
    "logprobs": lambda trial: trial.break_(
        sampling, "logprobs", lambda logits, drawn, top: TOP in top
    ),
    "PolicyTensors.stack": while_prefilling(PolicyTensors, "stack"),
    "Staging._lay_out": of_one(Staging, "_lay_out"),
    "Staging._run": of_one(Staging, "_run"),
    "Staging._run, afterwards": of_one(Staging, "_run", after=True),
    "Staging.finish": of_one(Staging, "finish"),
    "Engine._statistics": of_one(Engine, "_statistics"),
    "staging, cleared": while_prefilling(Slots, "clear"),
    "staging, blanked": while_prefilling(Rectangle, "blank"),
    "BlockPass.__init__": while_prefilling(BlockPass, "__init__"),
    "BlockPass.__call__": while_prefilling(BlockPass, "__call__"),
    "end_prompt": while_prefilling(a2sf.engine.staging, "end_prompt"),
    "Slots.copy_row": while_prefilling(Slots, "copy_row"),
    "Decoder.join": lambda trial: of_join(trial, after=False),
    "Decoder.join, afterwards": lambda trial: of_join(trial, after=True),
    "Decoder.move": lambda trial: of_move(trial, after=False),
    "Decoder.move, afterwards": lambda trial: of_move(trial, after=True),
}


FIELDS: dict[str, dict[str, Any]] = {
    "Sequence.overdue": {"time_limit_s": 100.0},
    # Before it reaches its own length.
    "Sequence.time_out": {"time_limit_s": 9.0, "max_new_tokens": 40},
    # The short request ends first; the victim is in the last row.
    "Decoder.move": {"max_new_tokens": 40},
    "Decoder.move, afterwards": {"max_new_tokens": 40},
}
