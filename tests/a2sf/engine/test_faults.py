"""An error of one request ends that request, without effect on others."""

from typing import Any

import pytest
import torch

from a2sf.cache.passes import DecodePass
from a2sf.engine.decoding import SteppedDecoder
from a2sf.engine.engine import Engine
from a2sf.engine.parallel import Follower, LeadingEngine
from a2sf.engine.sequence import Sequence
from a2sf.model.loader import LoadedModel
from a2sf.model.tensor_parallel import RankLost
from a2sf.policy import CachePolicy
from a2sf.requests import Failed, Finished, StepEvent
from a2sf.text.detokenizer import TextStream
from tests.a2sf.engine.test_parallel import SMALL, Wire
from tests.driving import engine_for, request, run, tokens
from tests.faults import (
    CALLS,
    FIELDS,
    LATER,
    NEIGHBOURS,
    TEXTS,
    Panic,
    Trial,
    of_move,
    victim,
    while_prefilling,
)


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


def test_a_request_that_fails_in_submit_leaves_no_state_behind(
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


def test_ranks_stay_in_step_after_a_request_fails_on_every_rank(
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
        messages = list(wire.messages)
        assert isinstance(streams["victim"][-1], Failed)
        assert isinstance(streams["short"][-1], Finished)
        Follower(tiny_model_64, wire).run()
    # A rank on which it does not fail differs, and raises.
    wire.messages[:] = messages
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
