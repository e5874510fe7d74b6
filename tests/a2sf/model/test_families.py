"""Every supported family equals transformers, and unsupported settings are refused."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from a2sf.engine import admission
from a2sf.engine.admission import EngineConfig
from a2sf.errors import NotFound, Unsupported
from a2sf.model import families
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from a2sf.policy import CachePolicy
from a2sf.requests import Started
from tests.driving import engine_for, finished, prompts, request, run, tokens
from tests.tables import make_table
from tests.tiny import EOS, save_tiny

# Settings in which families differ from Llama and that their defaults leave out: biases, heads
# wider than hidden / heads (which is 8), clipping, layers without rotation, partial rotation.
SETTINGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "ApertusForCausalLM": {
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "ArceeForCausalLM": {"head_dim": 16, "attention_bias": True},
    "Ernie4_5ForCausalLM": {"head_dim": 16, "use_bias": True},
    "GemmaForCausalLM": {"head_dim": 16, "attention_bias": True},
    "GlmForCausalLM": {"head_dim": 16},
    "Glm4ForCausalLM": {"head_dim": 16},
    "HeliumForCausalLM": {"head_dim": 8, "attention_bias": True},
    "MistralForCausalLM": {"head_dim": 16, "sliding_window": None},
    "OlmoForCausalLM": {"attention_bias": True, "clip_qkv": 1.0},
    "Olmo2ForCausalLM": {"attention_bias": True},
    "PhiForCausalLM": {"qk_layernorm": True},
    "Phi3ForCausalLM": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
    "Qwen3ForCausalLM": {"head_dim": 16, "attention_bias": True},
    "SeedOssForCausalLM": {"head_dim": 16, "attention_out_bias": True},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0, 1], "attention_bias": True},
}

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


def config_class(architecture: str) -> Any:
    return getattr(transformers, architecture).config_class


def save(architecture: str, directory: Path, **options: Any) -> Path:
    settings = {**SETTINGS.get(architecture, {}), **options}
    return save_tiny(config_class(architecture), directory, vectors=0.3, **settings)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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


@pytest.fixture(params=families.SUPPORTED_ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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
def test_it_generates_in_every_dtype_with_a_cache_of_that_dtype(
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


def test_the_fingerprint_does_not_depend_on_sharding_or_loaded_dtype(
    architecture: str, tmp_path: Path
) -> None:
    def fingerprint(name: str, dtype: str = "auto", **options: Any) -> str:
        directory = save(architecture, tmp_path / name, **options)
        return load_model(str(directory), device="cpu", dtype=dtype).identity.fingerprint

    original = fingerprint("whole")
    assert fingerprint("loaded", dtype="bfloat16") == original
    assert fingerprint("sharded", shard="20KB") == original
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint("other", seed=1) != original


def test_a_fused_projection_is_fingerprinted_in_every_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save("Phi3ForCausalLM", tmp_path)
    before = load_model(str(tmp_path), device="cpu").identity.fingerprint
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.2.self_attn.qkv_proj.weight"][0, 0] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(tmp_path), device="cpu").identity.fingerprint != before
    del weights["model.layers.2.self_attn.qkv_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFound, match=r"missing: model\.layers\.2\.self_attn\.qkv_proj\.weight"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("tie", [True, False])
def test_a_sharded_checkpoint_equals_the_whole_one(
    architecture: str, tie: bool, tmp_path: Path
) -> None:
    whole, sharded = (
        load_model(
            str(save(architecture, tmp_path / name, tie_word_embeddings=tie, shard=shard)),
            dtype="float64",
        )
        for name, shard in (("whole", "1GB"), ("sharded", "10KB"))
    )
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    # In float64, weights are not packed, so the module shows all of them.
    state = whole.module.state_dict()
    assert len(state) > 20
    for name, weight in sharded.module.state_dict().items():
        assert torch.equal(weight, state[name])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save("Qwen3ForCausalLM", tmp_path, shard="10KB")
    shard = max(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(NotFound, match=f"missing: {shard.name}"):
        load_model(str(tmp_path), device="cpu")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(NotFound, match=r"model\.safetensors\.index\.json cannot be read"):
        load_model(str(tmp_path), device="cpu")


def test_a_bfloat16_checkpoint_can_run_in_float32_on_a_processor(
    architecture: str, tmp_path: Path
) -> None:
    save(architecture, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    model = load_model(str(tmp_path), device="cpu")
    assert model.dtype == torch.float32
    for weight in model.module.parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weight.bfloat16().float())
    engine = engine_for(model)
    engine.submit(request("r", prompts(1, low=10)[0], max_new_tokens=3))
    assert len(tokens(run(engine)["r"])) == 3


def test_several_ends_of_sequence_and_a_padding_token_are_read(tmp_path: Path) -> None:
    save("Qwen2ForCausalLM", tmp_path)
    edit(tmp_path / "generation_config.json", eos_token_id=[EOS, 3], pad_token_id=4)
    assert load_model(str(tmp_path), device="cpu").eos_token_ids == {EOS, 3}


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_is_found_in_any_file(where: str, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    save("Qwen2ForCausalLM", tmp_path)
    if where.endswith(".json"):
        edit(tmp_path / where, chat_template=template)
    else:
        (tmp_path / where).write_text(template)
    assert load_model(str(tmp_path), device="cpu").tokenizer.chat_template == template


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 128,
    "factor": 4.0,
}


@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        (
            "MistralForCausalLM",
            {"sliding_window": 64},
            "window of 64 tokens in layers 0-2; a cache",
        ),
        ("Phi3ForCausalLM", {"sliding_window": 511}, "window of 511 tokens in layers 0-2;"),
        (
            "Qwen2ForCausalLM",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 1,
                "layer_types": None,
            },
            "window of 64 tokens in layers 1-2; a cache that evicts by score does not honour it; "
            "supported: the same model without one",
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "window of 64 tokens in layers 0, 2;",
        ),
        (
            "SmolLM3ForCausalLM",
            {"sliding_window": 64, "use_sliding_window": True, "layer_types": None},
            "window of 64 tokens in layers 1;",
        ),
        (
            "Qwen2ForCausalLM",
            {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            "window of no stated size in layers 0;",
        ),
        (
            "Qwen2ForCausalLM",
            {"layer_types": ["full_attention", "chunked_attention", "chunked_attention"]},
            "uses chunked_attention in layers 1-2; supported: full_attention",
        ),
        # Phi-3 and Mistral do not read layer_types.
        *(
            (
                architecture,
                {"sliding_window": 64, "layer_types": ["full_attention"] * 3},
                "window of 64 tokens in layers 0-2;",
            )
            for architecture in ("MistralForCausalLM", "Phi3ForCausalLM")
        ),
        ("Phi3ForCausalLM", {"rope_parameters": LONGROPE}, "rope type 'longrope', whose factors"),
        (
            "Qwen2ForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic', whose factors depend on the batch; supported: default, linear",
        ),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "attends in both directions"),
        ("LlamaForCausalLM", {"is_causal": False}, "attends in both directions"),
        (
            "Qwen2ForCausalLM",
            {"architectures": ["LlamaForCausalLM"]},
            "calls itself a LlamaForCausalLM, but its model_type 'qwen2' makes it a Qwen2",
        ),
    ],
)
def test_settings_that_we_would_compute_wrongly_are_refused_by_name(
    architecture: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    save(architecture, tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(Unsupported) as caught:
        load_model(str(tmp_path), device="cpu")
    assert says in str(caught.value)
    assert tmp_path.name in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 64, "use_sliding_window": False, "layer_types": None},
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
        {"sliding_window": 512, "use_sliding_window": True, "layer_types": None},
    ],
    ids=["off", "in no layer", "as long as the context"],
)
def test_a_window_without_effect_is_accepted(changes: dict[str, Any], tmp_path: Path) -> None:
    save("Qwen2ForCausalLM", tmp_path, max_window_layers=0)
    edit(tmp_path / "config.json", **changes)
    assert load_model(str(tmp_path), device="cpu").shape.max_context == 512


@pytest.mark.parametrize("config", [Gemma2Config, GraniteConfig])
def test_a_family_that_is_not_listed_is_refused_by_name(config: Any, tmp_path: Path) -> None:
    save_tiny(config, tmp_path, head_dim=8)
    name = config.__name__.replace("Config", "ForCausalLM")
    with pytest.raises(Unsupported, match=f"is a {name}; supported: LlamaForCausalLM, .*Qwen3"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("softcap", 30.0),
        ("s_aux", torch.zeros(4)),
        ("dropout", 0.1),
        ("sliding_window", 511),
        ("is_causal", False),
        ("output_attentions", True),
        ("never_heard_of", 0),
    ],
)
def test_an_argument_with_an_effect_is_refused_in_any_layer(argument: str, value: object) -> None:
    config = SimpleNamespace(max_position_embeddings=512)
    with pytest.raises(Unsupported, match=f"layer 3 attends with '{argument}'"):
        families.refuse_effects(3, config, {"dropout": 0.0, argument: value})


def test_arguments_without_an_effect_are_accepted() -> None:
    families.refuse_effects(
        0,
        SimpleNamespace(max_position_embeddings=512),
        {
            "dropout": 0.0,
            "output_attentions": False,
            "softcap": None,
            "s_aux": None,
            "sliding_window": 512,
            "position_ids": torch.zeros(1, 1),
            "use_cache": False,
        },
    )


def test_layers_are_listed_as_ranges() -> None:
    rng = random.Random(0)
    assert families._spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    for _ in range(20):
        layers = sorted(rng.sample(range(12), rng.randint(1, 12)))
        read = [span.split("-") for span in families._spans(layers).split(", ")]
        assert layers == [n for span in read for n in range(int(span[0]), int(span[-1]) + 1)]
