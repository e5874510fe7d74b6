"""The engine serves each request as asked, ends it correctly, and reports correct counts."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from a2sf.engine.engine import Engine
from a2sf.model.loader import LoadedModel, load_model
from a2sf.policy import CachePolicy
from a2sf.requests import Delta, Event, Finished, FinishReason, Sampling, Started, TokenLogprobs
from tests.driving import any_requests, engine_for, finished, prompts, request, run, tokens
from tests.tiny import save_tiny_llama


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_step_tokens_changes_only_the_number_of_steps(
    tiny_model_64: LoadedModel, piece: int
) -> None:
    made = any_requests(tiny_model_64, 24, seed=5, max_len=60, most=25)
    engines = [engine_for(tiny_model_64, step_tokens=tokens) for tokens in (512, piece)]
    streams = []
    for engine in engines:
        for one in made:
            engine.submit(one)
        streams.append(run(engine))
    for one in made:
        whole, cut = (stream[one.request_id] for stream in streams)
        assert tokens(whole) == tokens(cut)
        assert finished(whole).cache == finished(cut).cache


def test_the_shape_of_the_slab_does_not_change_results(tiny_model_64: LoadedModel) -> None:
    made = any_requests(tiny_model_64, 24, seed=8, max_len=60, most=25)
    streams = []
    # Every head of the shaped slab has at least the 90 slots that these requests need.
    shares = ((3.0, 1.0), (1.2, 1.0), (1.0, 2.0))
    for shape in ({}, {"head_share": shares, "slots": 160}):
        engine = engine_for(tiny_model_64, **shape)
        for one in made:
            engine.submit(one)
        streams.append(run(engine))
    flat, shaped = streams
    for one in made:
        assert tokens(flat[one.request_id]) == tokens(shaped[one.request_id])
        assert finished(flat[one.request_id]).cache == finished(shaped[one.request_id]).cache


def test_the_oldest_request_of_the_highest_priority_starts_first(
    tiny_model: LoadedModel,
) -> None:
    engine = engine_for(tiny_model, max_batch=1)
    for name, priority in (("a", 0), ("b", -1), ("c", 5), ("d", 0), ("e", 5)):
        engine.submit(request(name, range(5), priority=priority))
    order = [stream[0].request_id for stream in run(engine).values()]
    assert order == ["c", "e", "a", "d", "b"]


def test_an_exact_prompt_takes_one_step_per_piece(tiny_model: LoadedModel) -> None:
    engine = engine_for(tiny_model, step_tokens=16)
    exact = CachePolicy(alpha=0.9, budget=20)
    engine.submit(request("r", [7] * 100, cache_policy=exact, max_new_tokens=2))
    events = [[type(event) for event in engine.step()] for _ in range(8)]
    assert events == [[Started], [], [], [], [], [], [Delta], [Delta, Finished]]


def test_a_cancelled_request_frees_its_row_without_effect_on_others(
    tiny_model_64: LoadedModel,
) -> None:
    requested_policies = [
        CachePolicy(alpha=0.9, budget=20, recent=5, prefill_chunk=4),
        CachePolicy(preset="h2o", budget=32),
        CachePolicy(preset="window", budget=16),
        CachePolicy(preset="full"),
        CachePolicy(preset="random", budget=18, recent=3, random_seed=7),
    ]
    made = [
        request(str(index), prompt, cache_policy=requested_policy, max_new_tokens=60)
        for index, (prompt, requested_policy) in enumerate(
            zip(prompts(5, high=60), requested_policies, strict=True)
        )
    ]
    engine = engine_for(tiny_model_64, max_batch=3)
    for one in made:
        engine.submit(one)
    streams: dict[str, list[Event]] = {}
    for step in range(400):
        if step == 30:
            assert engine.running == 3
            engine.cancel("0")
            engine.cancel("4")  # still waiting
            engine.cancel("unknown")
            assert engine.running == 2
        for event in engine.step():
            streams.setdefault(event.request_id, []).append(event)
    assert not engine.has_work
    assert "4" not in streams
    assert not any(isinstance(event, Finished) for event in streams["0"])
    for one in made[1:4]:
        alone = engine_for(tiny_model_64)
        alone.submit(one)
        assert tokens(run(alone)[one.request_id]) == tokens(streams[one.request_id])


def test_used_bytes_do_not_grow_with_length_and_evictions_are_counted(
    tiny_model: LoadedModel,
) -> None:
    kv_bytes = []
    for length in (40, 100, 200):
        engine = engine_for(tiny_model)
        engine.submit(
            request(
                "r",
                range(30),
                max_new_tokens=length,
                cache_policy=CachePolicy(preset="h2o", budget=24),
            )
        )
        cache = finished(run(engine)["r"]).cache
        # The last drawn token never runs through the model.
        assert cache.kept_tokens + cache.evicted_tokens == 30 + length - 1
        assert cache.evicted_tokens == 30 + length - 1 - 24
        assert cache.kv_bytes_full == (30 + length - 1) * 3 * 2 * 2 * 8 * 4
        kv_bytes.append(cache.kv_bytes)
    assert kv_bytes == [24 * 3 * 2 * (2 * 8 * 4 + 8)] * 3


def test_a_stream_ends_at_eos_stop_token_stop_string_and_length(
    tiny_model: LoadedModel,
) -> None:
    requested_policy = CachePolicy(preset="full")
    engine = engine_for(tiny_model)
    engine.submit(request("plain", range(65, 90), cache_policy=requested_policy, max_new_tokens=60))
    plain = run(engine)["plain"]
    assert finished(plain).reason is FinishReason.LENGTH
    ids = tokens(plain)
    text = "".join(event.text for event in plain if isinstance(event, Delta))

    engine.submit(
        request(
            "id",
            range(65, 90),
            cache_policy=requested_policy,
            max_new_tokens=60,
            stop_token_ids=(ids[4],),
        )
    )
    stream = run(engine)["id"]
    assert finished(stream).reason is FinishReason.STOP
    assert tokens(stream) == ids[: ids.index(ids[4]) + 1]
    sent = "".join(event.text for event in stream if isinstance(event, Delta))
    assert sent == tiny_model.tokenizer.decode(ids[: ids.index(ids[4])])

    stop = text[5:8]
    engine.submit(
        request(
            "text",
            range(65, 90),
            cache_policy=requested_policy,
            max_new_tokens=60,
            stop=("\0\0", stop),
        )
    )
    stream = run(engine)["text"]
    assert finished(stream).reason is FinishReason.STOP
    assert finished(stream).matched_stop == stop
    sent = "".join(event.text for event in stream if isinstance(event, Delta))
    assert sent == text[: text.index(stop)]


def test_eos_ends_a_stream_unless_ignore_eos_is_set(tmp_path: Any, tiny_model: LoadedModel) -> None:
    # The same weights, but the first generated token is declared to be EOS.
    engine = engine_for(tiny_model)
    engine.submit(request("r", range(65, 90)))
    first = tokens(run(engine)["r"])
    directory = save_tiny_llama(tmp_path, eos_token_id=first[2])
    engine = engine_for(load_model(str(directory), device="cpu"))
    engine.submit(request("stop", range(65, 90), ignore_eos=False))
    engine.submit(request("go", range(65, 90), ignore_eos=True))
    streams = run(engine)
    assert finished(streams["stop"]).reason is FinishReason.END_OF_SEQUENCE
    assert tokens(streams["stop"]) == first[: first.index(first[2]) + 1]
    assert tokens(streams["go"]) == first


def text_of(stream: list[Event]) -> str:
    return "".join(event.text for event in stream if isinstance(event, Delta))


def logprobs_of(stream: list[Event]) -> list[TokenLogprobs]:
    return [one for event in stream if isinstance(event, Delta) for one in event.logprobs]


def test_no_token_ends_the_stream_before_min_new_tokens(
    tmp_path: Any, tiny_model: LoadedModel
) -> None:
    engine = engine_for(tiny_model)
    engine.submit(request("r", range(65, 90)))
    first = tokens(run(engine)["r"])
    directory = save_tiny_llama(tmp_path, eos_token_id=first[2])
    engine = engine_for(load_model(str(directory), device="cpu"))
    for least in (0, 2, 3, 9):
        engine.submit(
            request(
                "r",
                range(65, 90),
                ignore_eos=False,
                min_new_tokens=least,
                stop_token_ids=(first[0],) if least else (),
            )
        )
        stream = run(engine)["r"]
        got = tokens(stream)
        ends = {first[0], first[2]} if least else {first[2]}
        assert not ends & set(got[:least])
        assert len(got) > least
        ended_by_token = finished(stream).reason is not FinishReason.LENGTH
        assert (got[-1] in ends) == ended_by_token
        assert not ends & set(got[least:-1])
    engine.submit(request("go", range(65, 90), ignore_eos=True, min_new_tokens=9))
    # Tokens that do not end the stream are not banned.
    assert tokens(run(engine)["go"]) == first


@pytest.fixture(scope="module")
def plain(tiny_model: LoadedModel) -> list[str]:
    """The text that each token of a completion without stop strings adds."""
    engine = engine_for(tiny_model)
    engine.submit(request("plain", range(65, 90), max_new_tokens=40))
    return [event.text for event in run(engine)["plain"] if isinstance(event, Delta)]


@given(st.data(), st.integers(0, 40))
def test_deltas_join_to_the_completion_before_the_stop(
    tiny_model: LoadedModel, plain: list[str], data: st.DataObject, least: int
) -> None:
    text = "".join(plain)
    starts = data.draw(st.lists(st.integers(0, len(text) - 2), min_size=1, max_size=3))
    stop = tuple(text[at : at + data.draw(st.integers(1, 5))] for at in starts)
    engine = engine_for(tiny_model)
    engine.submit(request("r", range(65, 90), max_new_tokens=40, min_new_tokens=least, stop=stop))
    stream = run(engine)["r"]
    sent = text_of(stream)
    end = finished(stream)
    for count in range(least + 1, 41):
        before, read = "".join(plain[: count - 1]), "".join(plain[:count])
        places = [read.find(s, max(len(before) - len(s) + 1, 0)) for s in stop]
        if max(places) >= 0:
            assert sent == read[: min(at for at in places if at >= 0)]
            assert end.reason is FinishReason.STOP
            assert end.usage.completion_tokens == count
            return
    assert sent == text
    assert end.reason is FinishReason.LENGTH


def test_logprobs_are_those_of_the_model_and_only_on_request(
    tiny_model: LoadedModel, tiny_model_dir: Any
) -> None:
    prompt = tuple(range(65, 90))
    # Sampling settings change the drawn token, never the logprobs.
    requested = Sampling(temperature=0.7, top_k=5, repetition_penalty=1.5, seed=3)
    common = {"cache_policy": CachePolicy(preset="full"), "sampling": requested}
    engine = engine_for(tiny_model)
    engine.submit(request("quiet", prompt, **common))
    engine.submit(request("asks", prompt, **common, logprobs=True, top_logprobs=20))
    engine.submit(request("own", prompt, **common, logprobs=True))
    streams = run(engine)
    ids = tokens(streams["asks"])
    assert ids == tokens(streams["quiet"]) == tokens(streams["own"])
    assert logprobs_of(streams["quiet"]) == []
    with torch.inference_mode():
        logits = LlamaForCausalLM.from_pretrained(tiny_model_dir)(
            torch.tensor([[*prompt, *ids[:-1]]])
        ).logits[0, len(prompt) - 1 :]
    want = logits.double().log_softmax(-1)
    asked = logprobs_of(streams["asks"])
    assert [one.logprob for one in asked] == pytest.approx(
        want[range(len(ids)), ids].tolist(), abs=1e-4
    )
    for one, row in zip(asked, want, strict=True):
        assert [a.logprob for a in one.top] == pytest.approx(row.topk(20).values.tolist(), abs=1e-4)
        assert [a.logprob for a in one.top] == pytest.approx(
            row[[a.token_id for a in one.top]].tolist(), abs=1e-4
        )
    own = logprobs_of(streams["own"])
    assert [one.logprob for one in own] == pytest.approx([one.logprob for one in asked], abs=1e-4)
    assert all(one.top == () for one in own)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_time_limit_ends_a_request_in_any_state_with_its_text_so_far(
    tiny_model: LoadedModel,
) -> None:
    engine = engine_for(tiny_model)
    for name, length in (("six", 6), ("ten", 10)):
        engine.submit(request(name, range(65, 90), max_new_tokens=length))
    alone = run(engine)

    clock = Clock()
    engine = Engine(tiny_model, engine.config.model_copy(update={"max_batch": 2}), clock=clock)
    streams: dict[str, list[Event]] = {}

    def step() -> None:
        for event in engine.step():
            streams.setdefault(event.request_id, []).append(event)

    limit = {"time_limit_s": 5.0, "max_new_tokens": 60}
    # The last character may start this stop string, so it is withheld.
    stop = (text_of(alone["six"])[-1] + "and so on",)
    engine.submit(request("active", range(65, 90), stop=stop, **limit))
    for _ in range(4):
        step()
    chunks = CachePolicy(preset="h2o", budget=16, prefill_chunk=10)
    engine.submit(request("prefilling", range(40), cache_policy=chunks, **limit))
    engine.submit(request("waiting", range(5), **limit))
    engine.submit(request("patient", range(65, 90), max_new_tokens=10))
    for now in (1.0, 4.9):
        clock.now = now
        step()
    assert not any(isinstance(stream[-1], Finished) for stream in streams.values())
    clock.now = 5.0
    step()
    ended = {name: finished(streams[name]) for name in ("active", "prefilling", "waiting")}
    assert all(event.reason is FinishReason.TIME_LIMIT for event in ended.values())
    for name, stream in run(engine).items():
        streams[name] += stream

    assert tokens(streams["active"]) == tokens(alone["six"])
    assert text_of(streams["active"]) == text_of(alone["six"])
    rest = streams["active"][-2]
    assert isinstance(rest, Delta)
    assert (rest.text, rest.token_ids) == (stop[0][0], ())
    cache = ended["prefilling"].cache
    assert cache.kept_tokens + cache.evicted_tokens == 20
    times = ended["prefilling"].timings
    assert (times.queue_s, times.prefill_s, times.decode_s) == (1.0, 4.0, 0.0)
    assert ended["waiting"].cache.kv_bytes == 0
    assert ended["waiting"].timings.queue_s == 5.0
    for name in ("prefilling", "waiting"):
        assert [type(event) for event in streams[name]] == [Started, Finished]
        assert ended[name].usage.completion_tokens == 0
    # The freed rows serve the next request normally.
    assert tokens(streams["patient"]) == tokens(alone["ten"])
    for stream in streams.values():
        finished(stream)


@pytest.mark.gpu
def test_a_gpu_decodes_the_same_tokens_as_the_processor(tiny_model_dir: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    answers = []
    for device in ("cpu", "cuda"):
        model = load_model(str(tiny_model_dir), device=device, dtype="float64")
        engine = engine_for(model)
        for one in any_requests(model, 12, seed=5, max_len=60, most=25):
            engine.submit(one)
        answers.append({name: tokens(stream) for name, stream in run(engine).items()})
    assert answers[0] == answers[1]
