"""NaN and infinity end the request that caused them, and never reach another one."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from a2sf.engine.engine import Engine
from a2sf.errors import NonFinite
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.policy import CachePolicy
from a2sf.requests import Delta, Failed, Finished, GenerationRequest, Sampling, StepEvent
from tests.driving import engine_for, finished, prompts, request, run, tokens
from tests.tables import make_table
from tests.tiny import save_poisoned_llama
from tuner.evaluation.divergence import divergence, full_cache
from tuner.evaluation.objective import effective

POISON = 250
SIZES = {"slots": 64, "max_batch": 3, "step_tokens": 8, "cuda_graphs": False}

TEXTS = [[t % POISON for t in text] for text in prompts(4, low=36, high=44, seed=6)]

EVICTING = CachePolicy(preset="window", budget=6, sinks=0, prefill_chunk=4)
"""A policy under which the first tokens of a prompt of 40 tokens are evicted before its end."""


@pytest.fixture(scope="module", params=[torch.nan, torch.inf], ids=["nan", "inf"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("poisoned")
    save_poisoned_llama(directory, POISON, value=request.param)
    return load_model(str(directory), device="cpu", dtype="float32")


def poisoned(policy: CachePolicy, at: int, name: str = "poisoned") -> GenerationRequest:
    text = list(TEXTS[0])
    text[at] = POISON
    return request(name, text, cache_policy=policy, max_new_tokens=6, logprobs=True)


SHARES = ((0.5, 1.2), (1.0, 0.8), (1.5, 1.0))


def healthy(model: LoadedModel) -> list[GenerationRequest]:
    """Requests that reuse slots of others: wide rows, blocks after evictions, unequal heads."""
    unequal = make_table(model.identity, head_share=SHARES, sinks=1, recent=1)
    requested_policies = [
        CachePolicy(preset="full"),
        CachePolicy(alpha=0.9, budget=12, recent=2, prefill_chunk=5),
        CachePolicy(table=unequal.name, budget=12, prefill_chunk=1),
    ]
    return [
        request(
            f"healthy {i}",
            text,
            cache_policy=requested_policy,
            table=unequal if requested_policy.table else None,
            max_new_tokens=8,
            logprobs=True,
        )
        for i, (text, requested_policy) in enumerate(
            zip(TEXTS[1:], requested_policies, strict=True)
        )
    ]


def said(stream: list[StepEvent]) -> list[tuple[int, float]]:
    deltas = [event for event in stream if isinstance(event, Delta)]
    return [(d.token_ids[0], d.logprobs[0].logprob) for d in deltas]


def check_the_next(engine: Engine, model: LoadedModel) -> None:
    """Check that the engine's next results equal those of a new engine bit for bit."""
    new = engine_for(model, kernels=engine.kernels, **SIZES)
    streams = []
    for one in (engine, new):
        for healthy_one in healthy(model):
            one.submit(healthy_one)
        streams.append(run(one))
    used, fresh = streams
    for name, stream in fresh.items():
        assert finished(stream)
        assert said(used[name]) == said(stream)
        assert all(math.isfinite(logprob) for _, logprob in said(stream))


def all_finite(engine: Engine) -> bool:
    slab = engine._slab
    return all(bool(t.isfinite().all()) for t in (*slab.keys, *slab.values, slab.score))


def check_failed(stream: list[StepEvent]) -> None:
    last = stream[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, NonFinite)
    assert "non-finite logits" in str(last.error)
    assert all(math.isfinite(logprob) for _, logprob in said(stream))


PROMPTS = {
    "exact": (CachePolicy(preset="full"), 5),
    "exact, its last token": (CachePolicy(preset="h2o", budget=10), len(TEXTS[0]) - 1),
    "in blocks": (CachePolicy(alpha=0.9, budget=10, prefill_chunk=8), 20),
    "evicted before the last token": (EVICTING, 1),
    "step by step": (CachePolicy(preset="window", budget=8, prefill_chunk=1), 3),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_with_nan_fails_alone_and_does_not_affect_later_requests(
    kind: str, model: LoadedModel
) -> None:
    engine = engine_for(model, **SIZES)
    neighbour = healthy(model)[1]
    alone = engine_for(model, **SIZES)
    alone.submit(neighbour)
    want = said(run(alone)[neighbour.request_id])
    engine.submit(neighbour)
    engine.submit(poisoned(*PROMPTS[kind]))
    streams = run(engine)
    check_failed(streams["poisoned"])
    assert len(streams["poisoned"]) == 2, "Started and Failed, and no token"
    assert said(streams[neighbour.request_id]) == want
    assert (engine.running, engine.waiting, engine.kv_bytes_used) == (0, 0, 0)
    assert all_finite(engine)
    check_the_next(engine, model)


def cancel(engine: Engine, clock: list[float]) -> None:
    engine.cancel("poisoned")


def wait_for_too_long(engine: Engine, clock: list[float]) -> None:
    clock[0] = 100.0


@pytest.mark.parametrize("end", [cancel, wait_for_too_long])
def test_a_cancelled_prompt_with_nan_does_not_affect_later_requests(
    end: Callable[[Engine, list[float]], None], model: LoadedModel
) -> None:
    clock = [0.0]
    config = engine_for(model, **SIZES).config
    engine = Engine(model, config, clock=lambda: clock[0])
    one = poisoned(CachePolicy(preset="full"), 1)
    engine.submit(one.model_copy(update={"time_limit_s": 50.0}))
    engine.step()
    engine.step()
    # Two of the five pieces have run.
    assert engine._prefilling is not None
    assert not engine._staging.row.values[1].isfinite().all()
    end(engine, clock)
    assert not any(isinstance(e, Failed) for e in run(engine).get("poisoned", []))
    clock[0] = 0.0
    check_the_next(engine, model)


@pytest.fixture(scope="module")
def turning(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, int]:
    """A model that returns NaN in the middle of a completion, and after how many tokens."""
    plain = tmp_path_factory.mktemp("plain")
    save_poisoned_llama(plain, POISON, value=0.0)
    engine = engine_for(load_model(str(plain), device="cpu", dtype="float32"), **SIZES)
    engine.submit(request("turning", TEXTS[0], max_new_tokens=20))
    made = tokens(run(engine)["turning"])
    others = {token for text in TEXTS for token in text}
    for one in healthy(engine.model):
        engine.submit(one)
    others |= {token for stream in run(engine).values() for token in tokens(stream)}
    at = next(i for i, token in enumerate(made) if token not in others and i > 1)
    directory = tmp_path_factory.mktemp("turning")
    save_poisoned_llama(directory, POISON, value=0.0)
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][made[at]] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return load_model(str(directory), device="cpu", dtype="float32"), at + 1


def check_turning(model: LoadedModel, count: int, kernels: str, turns: range) -> None:
    """Requests get NaN while they decode, in the first, a middle and the last row."""
    sizes = {**SIZES, "kernels": kernels}
    neighbour = healthy(model)[1]
    alone = engine_for(model, **sizes)
    alone.submit(neighbour)
    want = said(run(alone)[neighbour.request_id])
    engine = engine_for(model, **sizes)
    for turn in turns:
        order = [
            request(f"turning {i}", TEXTS[0], max_new_tokens=20, logprobs=True) for i in range(2)
        ]
        order.insert(turn, neighbour)
        for one in order:
            engine.submit(one)
        streams = run(engine)
        for name in ("turning 0", "turning 1"):
            check_failed(streams[name])
            assert len(tokens(streams[name])) == count
        # In float32 the last bits of logprobs may depend on the batch size; tokens do not.
        assert [t for t, _ in said(streams[neighbour.request_id])] == [t for t, _ in want]
    assert all_finite(engine)
    check_the_next(engine, model)


def test_a_completion_with_nan_fails_alone_and_leaves_a_clean_row(
    turning: tuple[LoadedModel, int],
) -> None:
    check_turning(*turning, "torch", range(3))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_completion_with_nan_fails_alone_in_the_triton_kernels(
    turning: tuple[LoadedModel, int],
) -> None:
    pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")
    from a2sf.cache.kernels import decode_programs, prefill_programs, score_update
    from tests.interpreting import DEVICE, interpreting

    if DEVICE.type == "cuda":
        pytest.skip("the model is on the processor")
    with interpreting(score_update, decode_programs, prefill_programs):
        # The interpreter is slow, so only the first and the last row, with one between them.
        check_turning(*turning, "triton", range(1, 2))


def test_sampled_and_penalised_completions_fail_too(turning: tuple[LoadedModel, int]) -> None:
    model, _ = turning
    engine = engine_for(model, **SIZES)
    text = list(TEXTS[0])
    bad = next(
        i
        for i, row in enumerate(model.module.get_input_embeddings().weight)
        if not row.isfinite().all()
    )
    text[7] = bad
    requested_policies = [
        Sampling(seed=1),
        Sampling(seed=1, top_k=3, top_p=0.9, min_p=0.1),
        Sampling(temperature=0.0, repetition_penalty=1.3),
    ]
    for i, requested_policy in enumerate(requested_policies):
        engine.submit(
            request(str(i), text, sampling=requested_policy, min_new_tokens=2, ignore_eos=False)
        )
    for stream in run(engine).values():
        check_failed(stream)


def examples() -> list[Example]:
    """Texts of unequal lengths, so that batches are padded."""
    return [
        Example(tuple(TEXTS[1][:20]), 12, tuple(range(8, 19))),
        Example(tuple(TEXTS[2][:34]), 25, tuple(range(8, 33))),
        Example((*TEXTS[3][:5], POISON, *TEXTS[3][5:30]), 20, tuple(range(8, 30))),
    ]


@pytest.mark.parametrize("chunk", [0, 5, 1])
def test_texts_with_nan_do_not_affect_others_in_their_batch(model: LoadedModel, chunk: int) -> None:
    requested_policy = CachePolicy(alpha=0.9, budget=9, recent=2, prefill_chunk=chunk)
    made = examples()
    policies = [effective(requested_policy, model, len(one.token_ids)) for one in made]
    together = teacher_forcing.predict(model, made, policies, similarity=True)
    full = full_cache(model, made)
    for index, example in enumerate(made[:2]):
        (alone,) = teacher_forcing.predict(model, [example], [policies[index]], similarity=True)
        torch.testing.assert_close(together[index].logits, alone.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            together[index].similarity, alone.similarity, rtol=1e-4, atol=1e-4
        )
        assert all(map(math.isfinite, divergence(example, together[index], full[index])))
    with pytest.raises(NonFinite, match="KL to the full cache of an example of 31 tokens is nan"):
        divergence(made[2], together[2], full[2])


@pytest.mark.parametrize("policies", [None, "evicting"])
def test_padding_with_nan_does_not_affect_texts(policies: str | None, tmp_path: Path) -> None:
    """Even if the model returns NaN for every possible padding token and for all later tokens."""
    save_poisoned_llama(tmp_path, 0)
    model = load_model(str(tmp_path), device="cpu", dtype="float32")
    made = [
        Example(tuple(t + 1 for t in e.token_ids), *(e.prompt_tokens, e.counted))
        for e in examples()[:2]
    ]
    rules = None
    if policies:
        requested_policy = CachePolicy(alpha=0.9, budget=9, recent=2)
        rules = [effective(requested_policy, model, len(one.token_ids)) for one in made]
    for found in teacher_forcing.predict(model, made, rules):
        assert found.logits.isfinite().all()
    spoiled: list[bool] = []

    class Spoiling:
        """The inputs of attention are NaN in the padding of the shorter text."""

        def __call__(self, layer, query, keys, values, scale):  # type: ignore[no-untyped-def]
            spoiled.append(True)
            assert all(t.isfinite().all() for t in (query, keys, values))
            return query

    attention = teacher_forcing.without_padding(made, Spoiling())
    query = torch.ones(2, 4, 34, 8)
    query[0, :, 20:] = torch.nan
    attention(0, query, query[:, :2], query[:, :2], 1.0)
    assert spoiled


def test_logits_of_minus_infinity_are_accepted() -> None:
    example = Example((1, 2, 0), 1, (0, 1))
    logits = torch.tensor([[0.5, 1.0, 2.0, -torch.inf], [0.1, 1.0, 2.0, -torch.inf]])
    found = teacher_forcing.Prediction(logits=logits, similarity=None)
    kl, nll = divergence(example, found, logits.log_softmax(dim=-1))
    assert kl == pytest.approx(0.0, abs=1e-7)
    assert math.isfinite(nll)


def test_a_healthy_request_ends_with_finished(model: LoadedModel) -> None:
    engine = engine_for(model, **SIZES)
    for one in healthy(model):
        engine.submit(one)
    assert all(isinstance(stream[-1], Finished) for stream in run(engine).values())
