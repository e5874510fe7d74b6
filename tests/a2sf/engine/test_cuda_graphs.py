"""Decoding with fused kernels: rows join, move, end and pad a batch, and results do not change.

Without a CUDA device the programs run in Triton's interpreter on the processor, without graphs.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")

from a2sf.cache.kernels import (
    decode,
    decode_programs,
    prefill_programs,
    score_update,
    triton_walk,
    triton_walk_programs,
)
from a2sf.cache.passes import BlockPass
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots
from a2sf.engine import cuda_graphs, decoding
from a2sf.engine.engine import Engine
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from a2sf.policy import CachePolicy
from tests.driving import any_requests, effective, engine_for, request, rows_of, run, tokens
from tests.interpreting import CUDA, DEVICE, interpreting
from tests.near_ties import SIZES, check_against_torch


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with interpreting(score_update, decode_programs, prefill_programs, triton_walk_programs):
        yield


@pytest.fixture(scope="module")
def model(tiny_model_dir: Any) -> LoadedModel:
    """The tiny model in float32, where the kernels run."""
    return load_model(str(tiny_model_dir), device=DEVICE.type, dtype="float32")


@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_requests_equal_their_solo_runs_in_torch(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, multiprocessors: int
) -> None:
    # With and without splitting rows among programs.
    monkeypatch.setattr(decode, "_multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(decode, "TILE_BYTES", 1)
    assert check_against_torch(model, "triton", 4, seed=1, most=12) > 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_requests_equal_their_solo_runs_in_torch(model: LoadedModel, seed: int) -> None:
    assert check_against_torch(model, "triton", 24, seed=seed, most=14) > 8


def test_padding_rows_do_not_affect_real_rows(model: LoadedModel) -> None:
    # Three rows of five run as four; when the first ends, the last takes its place.
    sizes = {**SIZES, "max_batch": 5}
    made = [
        request(str(i), [i + 1] * (9 + i), max_new_tokens=most, cache_policy=policy)
        for i, (most, policy) in enumerate(
            [
                (4, CachePolicy(alpha=0.5, budget=8, recent=2)),
                (9, CachePolicy(preset="window", budget=7)),
                (9, CachePolicy(preset="random", budget=9, random_seed=5)),
            ]
        )
    ]
    engines = [engine_for(model, kernels=kernels, **sizes) for kernels in ("torch", "triton")]
    for engine in engines:
        for one in made:
            engine.submit(one)
    while engines[0].has_work:
        said = [[tokens([event]) for event in engine.step()] for engine in engines]
        assert said[0] == said[1]
        want, got = (rows_of(engine) for engine in engines)
        assert want.keys() == got.keys()
        for name, (position, score) in want.items():
            assert torch.equal(position, got[name][0])
            torch.testing.assert_close(score, got[name][1], rtol=1e-4, atol=1e-6)
    assert not engines[1].has_work


def test_batches_run_as_the_next_larger_power_of_two() -> None:
    assert cuda_graphs.batch_sizes(1) == [1]
    assert cuda_graphs.batch_sizes(8) == [1, 2, 4, 8]
    assert cuda_graphs.batch_sizes(48) == [1, 2, 4, 8, 16, 32, 48]


class Asked(TorchDispatchMode):
    """Fails on operations that sync with the device or cannot be captured."""

    WAITING = ("item", "_local_scalar_dense", "nonzero", "masked_select", "_to_copy", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_to_copy" and (kwargs or {}).get("device") in (None, args[0].device):
            name = "cast"
        assert name not in self.WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_sync_with_the_device(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Except the kernels, which the interpreter runs by its own operations.
    monkeypatch.setattr(cuda_graphs, "decode_attention", lambda query, *_, **__: query)
    engine = engine_for(model, kernels="triton", **SIZES)
    decoder = engine._decoder
    assert isinstance(decoder, cuda_graphs.FusedDecoder)
    for batch in decoder._graph_batches.values():
        with Asked():
            logits = decoder._run(batch, scored=True)
        assert logits.shape == (batch.inputs.shape[1], model.shape.vocab_size)
    with pytest.raises(AssertionError, match="waits"), Asked():
        int(logits[0, 0])


def test_unsupported_models_are_refused_by_name(
    model: LoadedModel, tiny_model_64: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidArgument, match="float64; accepted: bfloat16, float16, float32"):
        decoding.choose_kernels("triton", tiny_model_64)
    wide = replace(model, shape=replace(model.shape, head_dim=512))
    with pytest.raises(InvalidArgument, match="the model's head_dim is 512; accepted: up to 256"):
        decoding.choose_kernels("triton", wide)
    assert decoding.choose_kernels("auto", wide) == ("torch" if CUDA else "numba")
    if not CUDA:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(InvalidArgument, match="is a processor; accepted: cuda"):
            decoding.choose_kernels("triton", model)
        assert decoding.choose_kernels("auto", model) == "numba"


def block(model: LoadedModel, in_order: bool) -> tuple[Tensor, Slots]:
    """A prompt of 40 tokens in two pieces, in exactly as many slots; output of the second piece."""
    rng = torch.Generator().manual_seed(5)
    kv_heads, dim = 2, 16
    slots = Slots.empty(
        rows=1,
        slots=((40,) * kv_heads,),
        head_dim=dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    requested_policy = effective(model, CachePolicy(alpha=0.9, budget=50), 90)
    policy = PolicyTensors.stack([requested_policy], [90], slots.position.device).layer(0)
    assert policy.any_scored
    for first, width in ((0, 25), (25, 15)):
        piece = BlockPass(
            slots.view(slice(None), ((first + width,) * kv_heads,)),
            policy,
            start=torch.tensor([0]),
            lengths=torch.tensor([40]),
            used=torch.full_like(policy.budget, first),
            width=width,
            first=first,
            in_order=in_order,
        )
        q, k, v = (torch.randn(1, heads, width, dim, generator=rng) for heads in (4, 2, 2))
        output = piece(0, q, k, v, 0.25)
    return output, slots


def test_tokens_in_order_are_in_the_slots_that_a_search_would_find(model: LoadedModel) -> None:
    if CUDA:
        pytest.skip("the processor's own")
    (want, there), (got, here) = block(model, False), block(model, True)
    assert torch.equal(want, got)
    assert torch.equal(there.position, here.position)
    assert torch.equal(there.score, here.score)
    assert torch.equal(there.keys[0], here.keys[0])


def cuda_engine(model: LoadedModel, **config: Any) -> Engine:
    if not CUDA:
        pytest.skip("no CUDA device on this machine")
    return engine_for(model, **SIZES | config)


@pytest.mark.gpu
def test_a_captured_step_equals_an_uncaptured_step(model: LoadedModel) -> None:
    answers = []
    for graphs in (False, True):
        engine = cuda_engine(model, kernels="triton", cuda_graphs=graphs)
        for one in any_requests(model, 12, seed=5, max_len=30, most=25):
            engine.submit(one)
        answers.append({name: tokens(stream) for name, stream in run(engine).items()})
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_teacher_forcing_equals_torch(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    examples = [
        teacher_forcing.Example(
            tuple(rng.randrange(256) for _ in range(length)), prompt, tuple(range(3, length))
        )
        for length, prompt in ((14, 9), (20, 12))
    ]
    walks = []
    walk = triton_walk.walk

    def counted(*tokens: Tensor, **arguments: Any) -> None:
        walks.append(arguments["end"] - arguments["start"])
        walk(*tokens, **arguments)

    monkeypatch.setattr(triton_walk, "walk", counted)
    for chunk in (0, 5, 1):
        requested_policy = CachePolicy(alpha=0.9, budget=7, recent=2, prefill_chunk=chunk)
        policies = [effective(model, requested_policy, 20)] * len(examples)
        walks.clear()
        got = teacher_forcing.predict(model, examples, policies, similarity=True)
        # One launch per layer, for any number of tokens after the prompts.
        assert [one.tolist() for one in walks] == [
            [14, 20] if chunk == 1 else [5, 8]
        ] * model.shape.num_layers
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "choose_kernels", lambda *_: "torch")
            want = teacher_forcing.predict(model, examples, policies, similarity=True)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
            assert not torch.equal(one.logits, other.logits), "other kernels round differently"
            assert one.similarity is not None
            torch.testing.assert_close(one.similarity, other.similarity, rtol=1e-4, atol=1e-5)
            assert one.similarity.min() < 0.999
