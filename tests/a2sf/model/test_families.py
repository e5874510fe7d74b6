"""Every supported family equals transformers."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from a2sf.engine import admission
from a2sf.engine.config import EngineConfig
from a2sf.model import families
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from a2sf.policy import CachePolicy
from a2sf.requests import Started
from tests.driving import engine_for, finished, prompts, request, run, tokens
from tests.families import save
from tests.tables import make_table
from tests.tiny import EOS

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}


class Family(NamedTuple):
    """A random model, loaded by us and by transformers, in float64 to avoid near-ties."""

    directory: Path
    model: LoadedModel
    plain: Any


def family_of(directory: Path) -> Family:
    return Family(
        directory,
        load_model(str(directory), device="cpu", dtype="float64"),
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval(),
    )


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=families.SUPPORTED_ARCHITECTURES)
def family(
    request: pytest.FixtureRequest, tied: bool, tmp_path_factory: pytest.TempPathFactory
) -> Family:
    directory = tmp_path_factory.mktemp("family")
    return family_of(save(request.param, directory, tie_word_embeddings=tied))


def test_norms_and_biases_of_test_models_have_an_effect(family: Family) -> None:
    vectors = {n: p for n, p in family.plain.named_parameters() if p.ndim == 1 and p.numel() > 1}
    assert all(vector.std() > 0.1 for vector in vectors.values())
    assert family.model.module.config.tie_word_embeddings == (
        family.plain.get_input_embeddings().weight is family.plain.get_output_embeddings().weight
    )


def assert_generates_what_transformers_generates(family: Family) -> None:
    engine = engine_for(family.model)
    texts = prompts(2, low=20, high=60)
    requested_policies = [
        CachePolicy(preset="full"),
        CachePolicy(preset="h2o", budget=90),
        CachePolicy(alpha=0.5, budget=90, prefill_chunk=7),
    ]
    for index, text in enumerate(texts):
        for number, requested_policy in enumerate(requested_policies):
            engine.submit(request(f"{index}{number}", text, cache_policy=requested_policy))
    streams = run(engine)
    for index, text in enumerate(texts):
        want = family.plain.generate(
            torch.tensor([text]),
            attention_mask=torch.ones(1, len(text), dtype=torch.int64),
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=EOS + 1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        first, second = torch.cat(want.logits).topk(2).values.T
        assert (first - second).min() > 1e-5, "a near-tie: pick other texts"
        for number in range(len(requested_policies)):
            stream = streams[f"{index}{number}"]
            assert tokens(stream) == want.sequences[0, len(text) :].tolist()
            assert finished(stream).cache.evicted_tokens == 0


def assert_predicts_what_transformers_predicts(family: Family) -> None:
    texts = prompts(3, low=10)
    examples = [teacher_forcing.Example(tuple(t), len(t) // 2, tuple(range(len(t)))) for t in texts]
    for requested_policy in (
        CachePolicy(preset="full"),
        CachePolicy(preset="h2o", budget=90),
        None,
    ):
        policies = requested_policy and [
            admission.check(
                request("r", t, cache_policy=requested_policy),
                family.model,
                EngineConfig(slots=512),
            )
            for t in texts
        ]
        predicted = teacher_forcing.predict(family.model, examples, policies)
        for text, mine in zip(texts, predicted, strict=True):
            with torch.no_grad():
                want = family.plain(torch.tensor([text])).logits[0]
            torch.testing.assert_close(mine.logits, want, rtol=1e-5, atol=1e-5)


def test_with_room_for_all_tokens_generation_equals_transformers(family: Family) -> None:
    assert_generates_what_transformers_generates(family)


def test_teacher_forcing_with_room_equals_transformers_logits(family: Family) -> None:
    assert_predicts_what_transformers_predicts(family)


def test_starting_at_a_layer_equals_the_whole_model(family: Family) -> None:
    texts = prompts(3, low=20, high=60)
    examples = [teacher_forcing.Example(tuple(t), len(t) // 2, tuple(range(len(t)))) for t in texts]
    requested_policy = CachePolicy(alpha=0.5, budget=12)
    policies = [
        admission.check(
            request("r", t, cache_policy=requested_policy), family.model, EngineConfig(slots=512)
        )
        for t in texts
    ]
    whole = teacher_forcing.predict(family.model, examples, policies)
    below = None
    for layer in range(family.model.shape.num_layers):
        # Batches of two, so that the stored inputs are batched differently.
        below = teacher_forcing.compute_layer_input(
            family.model, examples, policies, layer, batch=2, layer_input=below
        )
        parts = teacher_forcing.predict(family.model, examples, policies, layer_input=below)
        for part, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(part.logits, expected.logits, rtol=1e-9, atol=1e-9)
    other = [
        p.model_copy(update={"alpha": ((0.99,) * len(p.alpha[0]),) * len(p.alpha)})
        for p in policies
    ]
    changed = teacher_forcing.predict(family.model, examples, other, layer_input=below)
    assert not torch.allclose(changed[0].logits, whole[0].logits), "the last layer is run"


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_every_supported_rotation_equals_transformers(
    architecture: str, rope_type: str, tmp_path: Path
) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **ROPES[rope_type]}
    family = family_of(save(architecture, tmp_path, rope_parameters=rope))
    assert_generates_what_transformers_generates(family)
    assert_predicts_what_transformers_predicts(family)


def test_a_window_as_long_as_the_context_is_accepted(tmp_path: Path) -> None:
    family = family_of(save("MistralForCausalLM", tmp_path, sliding_window=512))
    assert_generates_what_transformers_generates(family)


def test_with_eviction_the_engine_equals_teacher_forcing(family: Family) -> None:
    table = make_table(family.model.identity, prefill_chunk=5)
    for index, requested_policy in enumerate(
        [
            CachePolicy(table=table.name),
            CachePolicy(preset="h2o", budget=20),
            CachePolicy(preset="random", budget=20, recent=2, prefill_chunk=3),
        ]
    ):
        prompt = prompts(1, low=30, high=50, seed=index)[0]
        engine = engine_for(family.model)
        used = table if requested_policy.table else None
        engine.submit(request("r", prompt, cache_policy=requested_policy, table=used))
        stream = run(engine)["r"]
        assert isinstance(stream[0], Started)
        assert finished(stream).cache.evicted_tokens > 0
        answer = tokens(stream)
        example = teacher_forcing.Example(
            token_ids=(*prompt, *answer),
            prompt_tokens=len(prompt),
            counted=tuple(range(len(prompt) - 1, len(prompt) + len(answer) - 1)),
        )
        (predicted,) = teacher_forcing.predict(family.model, [example], [stream[0].policy])
        assert predicted.logits.argmax(dim=-1).tolist() == answer
        (whole,) = teacher_forcing.predict(family.model, [example], None)
        assert (predicted.logits - whole.logits).abs().max() > 0.01, "eviction changed nothing"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_cache_has_the_dtype_of_the_model(
    architecture: str, dtype: str, tmp_path: Path
) -> None:
    model = load_model(str(save(architecture, tmp_path)), device="cpu", dtype=dtype)
    engine = engine_for(model)
    for index, prompt in enumerate(prompts(2, low=30)):
        requested_policy = CachePolicy(alpha=0.9, budget=20, recent=4, prefill_chunk=6)
        engine.submit(request(str(index), prompt, cache_policy=requested_policy, max_new_tokens=5))
    streams = run(engine)
    assert [len(tokens(stream)) for stream in streams.values()] == [5, 5]
    stored = {t.dtype for t in (*engine._slab.keys, *engine._slab.values)}
    assert stored == {getattr(torch, dtype)} == {model.dtype}
