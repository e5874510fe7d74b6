"""An error of one request ends that request, without effect on others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import a2sf.engine.staging
from a2sf.cache.passes import BlockPass, DecodePass
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Rectangle, Slots
from a2sf.engine import sampling
from a2sf.engine.decoding import SteppedDecoder
from a2sf.engine.engine import Engine
from a2sf.engine.parallel import Follower, LeadingEngine
from a2sf.engine.sequence import Sequence
from a2sf.engine.staging import Staging
from a2sf.model.loader import LoadedModel
from a2sf.model.tensor_parallel import RankLost
from a2sf.policy import CachePolicy
from a2sf.requests import Failed, Finished, GenerationRequest, Sampling, StepEvent
from a2sf.text.detokenizer import TextStream
from tests.a2sf.engine.test_parallel import SMALL, Wire
from tests.driving import engine_for, prompts, request, run, tokens

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


@pytest.fixture(scope="module")
def alone(tiny_model_64: LoadedModel) -> dict[str, list[int]]:
    """The tokens of each healthy request when it is served alone."""
    found = {}
    for one in (*NEIGHBOURS, *LATER):
        engine = engine_for(tiny_model_64)
        engine.submit(one)
        found[one.request_id] = tokens(run(engine)[one.request_id])
    return found


@pytest.fixture
def trial(tiny_model_64: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Trial:
    made = Trial(tiny_model_64, monkeypatch)
    decode = Engine._decode

    def noted(engine: Engine) -> Any:
        made.patched_decoding = True
        logits = decode(engine)
        made.patched_decoding = False
        return logits

    monkeypatch.setattr(Engine, "_decode", noted)
    return made


def check_neighbours(
    trial: Trial, streams: dict[str, list[StepEvent]], alone: dict[str, list[int]]
) -> None:
    """Check that concurrent and later requests equal their solo runs, and that no state is left."""
    for one in NEIGHBOURS:
        assert isinstance(streams[one.request_id][-1], Finished)
        assert tokens(streams[one.request_id]) == alone[one.request_id]
    assert trial.raised
    trial.patch.undo()
    engine = trial.engine
    assert (engine.running, engine.waiting, engine.kv_bytes_used) == (0, 0, 0)
    assert not engine.has_work
    # As many requests as rows, so one uses the victim's row; its id is free again.
    for one in LATER:
        engine.submit(one)
    again = run(engine)
    assert {name: tokens(stream) for name, stream in again.items()} == {
        one.request_id: alone[one.request_id] for one in LATER
    }
    engine.submit(victim())
    assert isinstance(run(engine)["victim"][-1], Finished)


@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_one_request_ends_only_that_request(
    call: str, trial: Trial, alone: dict[str, list[int]]
) -> None:
    CALLS[call](trial)
    engine = trial.engine
    order = [NEIGHBOURS[0], victim(**FIELDS.get(call, {})), NEIGHBOURS[1]]
    if "move" in call:
        order[1:] = order[:0:-1]
    for one in order:
        engine.submit(one)
    streams = trial.run()
    *before, last = streams["victim"]
    assert isinstance(last, Failed)
    assert isinstance(last.error, Panic)
    assert last.error.__traceback__ is not None
    assert not any(isinstance(event, Failed | Finished) for event in before)
    assert not any(isinstance(e, Failed) for name in streams for e in streams[name][:-1])
    check_neighbours(trial, streams, alone)


def test_an_error_in_a_step_by_step_prefill_ends_only_that_request(
    trial: Trial, alone: dict[str, list[int]]
) -> None:
    while_prefilling(DecodePass, "__init__")(trial)
    requested_policy = CachePolicy(preset="window", budget=12, prefill_chunk=1)
    for one in (*NEIGHBOURS, victim(cache_policy=requested_policy)):
        trial.engine.submit(one)
    streams = trial.run()
    assert isinstance(streams["victim"][-1], Failed)
    check_neighbours(trial, streams, alone)


def test_a_request_that_fails_in_submit_leaves_no_trace(
    trial: Trial, alone: dict[str, list[int]]
) -> None:
    trial.break_(TextStream, "__init__", lambda text, model, prompt, *_: prompt == tuple(TEXTS[0]))
    trial.engine.submit(NEIGHBOURS[0])
    with pytest.raises(Panic):
        trial.engine.submit(victim())
    trial.engine.submit(NEIGHBOURS[1])
    check_neighbours(trial, trial.run(), alone)


def test_a_failed_move_during_a_cancel_is_reported_in_the_next_step(
    trial: Trial, alone: dict[str, list[int]]
) -> None:
    of_move(trial, after=False)
    engine = trial.engine
    gone = request("gone", TEXTS[3], max_new_tokens=50)
    for one in (gone, NEIGHBOURS[0], victim(max_new_tokens=50)):
        engine.submit(one)
    streams: dict[str, list[StepEvent]] = {}
    while engine.running < 3 or engine._prefilling is not None:
        for event in engine.step():
            streams.setdefault(event.request_id, []).append(event)
    engine.cancel("gone")
    assert engine.running == 1
    engine.submit(NEIGHBOURS[1])
    for name, stream in trial.run().items():
        streams.setdefault(name, []).extend(stream)
    assert isinstance(streams["victim"][-1], Failed)
    assert not any(isinstance(event, Failed | Finished) for event in streams["gone"])
    check_neighbours(trial, streams, alone)


def test_cancelling_a_failed_request_drops_its_event(trial: Trial) -> None:
    of_move(trial, after=False)
    engine = trial.engine
    for one in (request("gone", TEXTS[3], max_new_tokens=50), victim(max_new_tokens=50)):
        engine.submit(one)
    while len(engine._active) < 2:
        engine.step()
    engine.cancel("gone")
    assert engine.has_work
    engine.cancel("victim")
    assert not engine.has_work


def test_exceptions_that_end_the_process_are_raised(trial: Trial) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    trial.patch.setattr(Sequence, "accept", interrupt)
    trial.engine.submit(victim())
    with pytest.raises(KeyboardInterrupt):
        trial.run()


def test_an_error_in_the_pass_of_all_rows_ends_the_engine(trial: Trial) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    trial.engine.submit(NEIGHBOURS[0])
    trial.engine.step()
    trial.patch.setattr(SteppedDecoder, "step", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        trial.run()


def test_ranks_stay_in_step_after_a_request_fails_on_all(
    tiny_model_64: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = TextStream.push

    def broken(text: TextStream, token: int) -> str:
        if text._stop == ("the victim's",):
            raise Panic
        return push(text, token)

    wire = Wire()
    engine = LeadingEngine(tiny_model_64, SMALL, wire)
    engine.submit(victim(stop=("the victim's",)))
    engine.submit(NEIGHBOURS[0])
    with monkeypatch.context() as patch:
        patch.setattr(TextStream, "push", broken)
        streams = run(engine)
        engine.close()
        told = list(wire.messages)
        assert isinstance(streams["victim"][-1], Failed)
        assert isinstance(streams["short"][-1], Finished)
        Follower(tiny_model_64, wire).run()
    # A rank on which it does not fail differs, and raises.
    wire.messages[:] = told
    with pytest.raises(RankLost):
        Follower(tiny_model_64, wire).run()


def test_an_error_in_a_pass_shared_by_processes_ends_the_engine(
    trial: Trial, tiny_model_64: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other processes are still in the pass and would wait for ever."""

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    object.__setattr__(tiny_model_64, "local_heads", (0, 2))
    try:
        trial.engine.submit(victim())
        monkeypatch.setattr(LoadedModel, "hidden_states", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            trial.run()
    finally:
        object.__setattr__(tiny_model_64, "local_heads", None)
