"""Decoding with numba: rows join, move and end, and results equal those of torch."""

import random
from dataclasses import replace

import pytest
import torch

from a2sf.engine import decoding
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from a2sf.policy import CachePolicy
from tests.driving import effective
from tests.near_ties import check_against_torch


def test_requests_equal_their_solo_runs_in_torch(tiny_model: LoadedModel) -> None:
    assert check_against_torch(tiny_model, "numba", 6, seed=1, most=12) > 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_requests_equal_their_solo_runs_in_torch(tiny_model: LoadedModel, seed: int) -> None:
    assert check_against_torch(tiny_model, "numba", 24, seed=seed, most=14) > 8


def test_auto_chooses_numba_on_a_processor_if_it_supports_the_dtype(
    tiny_model: LoadedModel, tiny_model_64: LoadedModel
) -> None:
    assert decoding.choose_kernels("auto", tiny_model) == "numba"
    assert decoding.choose_kernels("auto", tiny_model_64) == "torch"
    assert decoding.choose_kernels("torch", tiny_model) == "torch"
    with pytest.raises(InvalidArgument, match="numba, but the model is in float64; accepted: "):
        decoding.choose_kernels("numba", tiny_model_64)
    elsewhere = replace(tiny_model, device=torch.device("meta"))
    with pytest.raises(InvalidArgument, match="the device is meta; accepted: cpu"):
        decoding.choose_kernels("numba", elsewhere)


@pytest.mark.parametrize("chunk", [0, 1, 5])
def test_teacher_forcing_equals_torch(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    rng = random.Random(2)
    examples = [
        teacher_forcing.Example(
            tuple(rng.randrange(256) for _ in range(length)), prompt, tuple(range(3, length - 1))
        )
        for length, prompt in ((14, 9), (40, 12), (30, 30), (25, 1))
    ]
    requested_policies = (
        {"alpha": 0.9, "budget": 7, "recent": 2},
        {"preset": "window", "budget": 8},
        {"preset": "random", "budget": 9, "random_seed": 5},
        {"alpha": 0.0, "budget": 40},
    )
    policies = [
        effective(tiny_model, CachePolicy(**requested_policy, prefill_chunk=chunk), 40)
        for requested_policy in requested_policies
    ]
    got = teacher_forcing.predict(tiny_model, examples, policies, similarity=True)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "choose_kernels", lambda *_: "torch")
        want = teacher_forcing.predict(tiny_model, examples, policies, similarity=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.similarity, other.similarity, rtol=1e-4, atol=1e-5)
    differ = [not torch.equal(a.logits, b.logits) for a, b in zip(got, want, strict=True)]
    assert any(differ), "other kernels round differently"


def test_teacher_forcing_in_bfloat16_equals_float32_up_to_rounding(
    tiny_model_dir, tiny_model: LoadedModel
) -> None:
    # The weights are exact in bfloat16, so only computed values are rounded.
    half = load_model(str(tiny_model_dir), device="cpu", dtype="bfloat16")
    assert decoding.choose_kernels("auto", half) == "numba"
    rng = random.Random(3)
    example = teacher_forcing.Example(
        tuple(rng.randrange(256) for _ in range(60)), 20, tuple(range(59))
    )
    # Nothing is evicted: rounding may change which token is evicted.
    requested_policy = effective(tiny_model, CachePolicy(preset="full"), 60)
    (walked,) = teacher_forcing.predict(half, [example], [requested_policy])
    (whole,) = teacher_forcing.predict(half, [example], None)
    spread = float(whole.logits.std())
    assert float((walked.logits - whole.logits).abs().max()) < 0.2 * spread
