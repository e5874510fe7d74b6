"""Predictions with given prompts equal those with prompts that are run."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from a2sf.engine import decoding
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import prompts, teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.policy import CachePolicy, EffectivePolicy
from tests.tiny import save_poisoned_llama
from tuner.evaluation.objective import effective

LENGTHS = ((14, 9), (40, 12), (30, 30), (25, 1))
"""Number of tokens of each text and of its prompt; one text ends with its prompt."""

ROUNDING = {"rtol": 1e-4, "atol": 5e-5}
"""Few rows are multiplied by another kernel than many, so float32 rounds differently."""

REQUESTED = (
    CachePolicy(alpha=0.9, budget=7, recent=2),
    CachePolicy(preset="window", budget=8),
    CachePolicy(preset="random", budget=9, random_seed=5),
    CachePolicy(preset="h2o", budget=6),
)


@pytest.fixture
def examples() -> list[Example]:
    rng = random.Random(2)
    return [
        # Counted positions are in the prompt and after it.
        Example(tuple(rng.randrange(1, 256) for _ in range(length)), prompt, tuple(range(length)))
        for length, prompt in LENGTHS
    ]


def policies(model: LoadedModel, examples: list[Example]) -> list[EffectivePolicy]:
    return [
        effective(requested_policy, model, len(example.token_ids))
        for requested_policy, example in zip(REQUESTED, examples, strict=True)
    ]


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_predictions_with_given_prompts_equal_those_of_whole_texts(
    tiny_model: LoadedModel,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    batch: int,
) -> None:
    monkeypatch.setattr(decoding, "choose_kernels", lambda *_: backend)
    rules = policies(tiny_model, examples)
    want = teacher_forcing.predict(tiny_model, examples, rules, batch=batch, similarity=True)
    known = teacher_forcing.read_prompts(tiny_model, examples, batch=batch)
    assert [prompt.tokens for prompt in known] == [prompt for _, prompt in LENGTHS]
    got = teacher_forcing.predict(
        tiny_model, examples, rules, batch=batch, similarity=True, prompts=known
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.logits, other.logits, **ROUNDING)
        torch.testing.assert_close(one.similarity, other.similarity, rtol=1e-5, atol=1e-6)
    full = teacher_forcing.predict(tiny_model, examples, None)
    assert not torch.allclose(got[1].logits, full[1].logits), "something was evicted"


def test_in_float64_they_are_equal_up_to_rounding(
    tiny_model_64: LoadedModel, examples: list[Example]
) -> None:
    rules = policies(tiny_model_64, examples)
    known = teacher_forcing.read_prompts(tiny_model_64, examples)
    for one, other in zip(
        teacher_forcing.predict(tiny_model_64, examples, rules, prompts=known),
        teacher_forcing.predict(tiny_model_64, examples, rules),
        strict=True,
    ):
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-11, atol=1e-11)


def test_only_the_tokens_after_the_prompts_are_run(
    tiny_model: LoadedModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = policies(tiny_model, examples)
    known = teacher_forcing.read_prompts(tiny_model, examples)
    widths = []
    honest: Callable[..., torch.Tensor] = LoadedModel.hidden_states

    def noting(self: LoadedModel, ids: torch.Tensor, *rest: object) -> torch.Tensor:
        widths.append(ids.shape[1])
        return honest(self, ids, *rest)

    monkeypatch.setattr(LoadedModel, "hidden_states", noting)
    teacher_forcing.predict(tiny_model, examples, rules, prompts=known)
    assert widths == [max(length - prompt for length, prompt in LENGTHS)]


def test_a_layer_input_can_be_combined_with_given_prompts(
    tiny_model: LoadedModel, examples: list[Example]
) -> None:
    rules = policies(tiny_model, examples)
    known = teacher_forcing.read_prompts(tiny_model, examples)
    want = teacher_forcing.predict(tiny_model, examples, rules)
    below = None
    for layer in range(3):
        below = teacher_forcing.compute_layer_input(
            tiny_model, examples, rules, layer, batch=2, layer_input=below, prompts=known
        )
        assert [len(one) for one in below.hidden] == [length - prompt for length, prompt in LENGTHS]
        got = teacher_forcing.predict(tiny_model, examples, rules, layer_input=below, prompts=known)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.logits, other.logits, **ROUNDING)


def test_padding_does_not_affect_texts_with_given_prompts(
    tmp_path: Path, examples: list[Example]
) -> None:
    # Token 0 makes all later values NaN. No text has it; padding with 0 would.
    save_poisoned_llama(tmp_path, 0)
    model = load_model(str(tmp_path), device="cpu", dtype="float32")
    known = teacher_forcing.read_prompts(model, examples)
    for found in teacher_forcing.predict(model, examples, policies(model, examples), prompts=known):
        assert found.logits.isfinite().all()


def test_prompts_take_the_documented_memory(
    tiny_model: LoadedModel, examples: list[Example]
) -> None:
    known = teacher_forcing.read_prompts(tiny_model, examples)
    nbytes = sum(tensor.nbytes for one in known for layer in one.projected for tensor in layer)
    tokens = sum(prompt for _, prompt in LENGTHS)
    assert nbytes == prompts.nbytes(tiny_model.shape, tiny_model.dtype, tokens)
