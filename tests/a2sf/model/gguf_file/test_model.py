"""A model in a GGUF file computes the same as the checkpoint from which the file was written."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from a2sf.errors import NotFound, Unsupported
from a2sf.model.loader import LoadedModel, load_model
from a2sf.model.spec import read_model_spec
from a2sf.policy import CachePolicy
from tests.driving import engine_for, request, run, tokens
from tests.gguf_files import TOKENS, VOCABULARY, interleave, save_checkpoint, save_gguf
from tests.tiny import EOS

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}

TEXT = [5, 80, 17, 200, 41, 99, 3, 3, 120, 64, 250, 7]


def logits(model: LoadedModel, text: list[int] = TEXT) -> torch.Tensor:
    """Our logits along `text` [tokens, vocab], with plain attention instead of a cache."""

    def attend(
        layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )

    ids = torch.tensor([text])
    positions = torch.arange(len(text))[None]
    return model.logits(model.hidden_states(ids, positions, attend))[0]


def plain(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.no_grad()
def assert_same(model: LoadedModel, reference: Any, text: list[int] = TEXT) -> None:
    want = reference(torch.tensor([text])).logits[0]
    torch.testing.assert_close(logits(model, text), want, rtol=1e-4, atol=1e-4)


def load(path: Path, **options: Any) -> LoadedModel:
    return load_model(str(path), **{"device": "cpu", "dtype": "float32", **options})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        (LlamaConfig, {"head_dim": 32, "num_key_value_heads": 4}),
        (Qwen2Config, {}),
        (Qwen3Config, {}),
        (Qwen3Config, {"head_dim": 32, "attention_bias": True}),
    ],
    ids=["llama", "llama-biases", "llama-wide", "qwen2", "qwen3", "qwen3-wide"],
)
def test_its_logits_equal_those_of_its_checkpoint(
    family: type[PreTrainedConfig], settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(
        tmp_path / "checkpoint", family, tie_word_embeddings=tied, **settings
    )
    model = load(save_gguf(checkpoint, tmp_path / "m.gguf"))
    assert model.module.config.tie_word_embeddings is tied
    assert_same(model, plain(checkpoint))


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
def test_a_scaled_rotation_is_supported(
    rope_type: str, family: type[PreTrainedConfig], tmp_path: Path
) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **ROPES[rope_type]}
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, rope_parameters=rope)
    model = load(save_gguf(checkpoint, tmp_path / "m.gguf"))
    text = [index * 7 % 256 for index in range(200)]
    assert_same(model, plain(checkpoint), text)
    default = save_checkpoint(tmp_path / "default", family)
    assert (plain(default)(torch.tensor([text])).logits[0] - logits(model, text)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_1", "Q4_0"])
@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config], ids=["llama", "qwen2"])
def test_quantised_weights_are_unpacked_to_their_values(
    kind: str, family: type[PreTrainedConfig], tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family)
    type_ = GGMLQuantizationType[kind]
    model = load(save_gguf(checkpoint, tmp_path / "m.gguf", kind=type_))
    reference = plain(checkpoint)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim > 1:
                packed = gguf.quantize(parameter.numpy(), type_)
                parameter.copy_(torch.from_numpy(gguf.dequantize(packed, type_)))
    assert_same(model, reference)


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config], ids=["llama", "qwen2"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_same_model_from_the_same_file(
    family: type[PreTrainedConfig], tmp_path: Path
) -> None:
    # transformers' reader takes the size of a head only from this key.
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family)
    own = {"llama__rope__dimension_count": 16} if family is LlamaConfig else {}
    path = save_gguf(
        checkpoint, tmp_path / "m.gguf", kind=GGMLQuantizationType.Q8_0, general__name="tiny", **own
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    assert_same(load(path), theirs)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants_are_unpacked_as_in_another_library(kind: str, tmp_path: Path) -> None:
    from transformers.integrations.gguf.dequant import dequantize

    checkpoint = save_checkpoint(tmp_path / "checkpoint", hidden_size=256, num_hidden_layers=1)
    type_ = GGMLQuantizationType[kind]
    elements, width = gguf.GGML_QUANT_SIZES[type_]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (96, 256 // elements * width), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    where = [0, 2] if kind == "Q4_K" else [width - 2]
    for start in where:
        blocks[:, start : start + 2] = scale
    path = save_gguf(checkpoint, tmp_path / "m.gguf", tensors={"blk.0.ffn_up.weight": None})
    # The library cannot quantise to K-quants, so the blocks are made here.
    path = with_raw_tensor(path, tmp_path / "k.gguf", "blk.0.ffn_up.weight", blocks, type_)
    want = dequantize(torch.from_numpy(blocks.reshape(-1)), type_.value).reshape(96, 256)
    weight = load(path).module.model.layers[0].mlp.up_proj.weight
    assert want.abs().max() > 0.1
    torch.testing.assert_close(weight, want)


def with_raw_tensor(
    source: Path, path: Path, name: str, blocks: Any, kind: GGMLQuantizationType
) -> Path:
    """Copy a GGUF file and add an already packed tensor."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_auto_loads_weights_in_the_stored_dtype_except_on_processors(
    tmp_path: Path,
) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    for kind, dtype in [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")]:
        path = save_gguf(checkpoint, tmp_path / f"{kind}.gguf", kind=GGMLQuantizationType[kind])
        model = load(path, dtype="auto")
        assert model.dtype == torch.float32
        assert model.module.config.dtype == torch.float32
        assert load(path, dtype=dtype).dtype_name == dtype
        assert str(read_model_spec(str(path), device_type="cuda").dtype) == f"torch.{dtype}"


def test_the_only_file_of_a_directory_is_the_model(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "models").mkdir()
    path = save_gguf(checkpoint, tmp_path / "models" / "tiny-F32.gguf")
    assert load(path.parent).identity == load(path).identity
    save_gguf(checkpoint, tmp_path / "models" / "other.gguf")
    with pytest.raises(NotFound, match=r"2 GGUF files .* such as other\.gguf"):
        load(path.parent)


def test_a_checkpoint_takes_precedence_over_a_gguf_file_in_the_same_directory(
    tmp_path: Path,
) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    save_gguf(checkpoint, checkpoint / "m.gguf")
    assert load(checkpoint).identity.id == "checkpoint"


def test_a_missing_file_is_named() -> None:
    with pytest.raises(NotFound, match=r"'no/such\.gguf': no such file"):
        load(Path("no/such.gguf"))


def test_the_id_is_the_file_name_with_the_quantisation(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    said = save_gguf(checkpoint, tmp_path / "tiny.q8_0.gguf", kind=GGMLQuantizationType.Q8_0)
    unsaid = save_gguf(checkpoint, tmp_path / "tiny.gguf", kind=GGMLQuantizationType.Q8_0)
    assert load(said).identity.id == "tiny.q8_0"
    assert load(unsaid).identity.id == "tiny.Q8_0"
    assert load(said).identity.fingerprint == load(unsaid).identity.fingerprint


def test_the_fingerprint_differs_by_weights_quantisation_and_mixture(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    other = save_checkpoint(tmp_path / "other", seed=1)
    q8 = GGMLQuantizationType.Q8_0
    paths = [
        checkpoint,
        save_gguf(checkpoint, tmp_path / "f32.gguf"),
        save_gguf(checkpoint, tmp_path / "q8.gguf", kind=q8),
        save_gguf(other, tmp_path / "other.gguf", kind=q8),
    ]
    marks = {load(path).identity.fingerprint for path in paths}
    assert len(marks) == 4
    whole = save_gguf(
        checkpoint, tmp_path / "whole.gguf", kind=q8, tensors={"blk.1.attn_v.weight": None}
    )
    blocks = gguf.quantize(np.ones((32, 64), np.float32), GGMLQuantizationType.Q4_0)
    mixture = with_raw_tensor(
        whole, tmp_path / "mix.gguf", "blk.1.attn_v.weight", blocks, GGMLQuantizationType.Q4_0
    )
    assert load(mixture).identity.fingerprint not in marks
    assert load(paths[2], dtype="bfloat16").identity == load(paths[2]).identity


def test_the_ends_of_an_answer_are_those_of_the_file(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    assert load(save_gguf(checkpoint, tmp_path / "one.gguf")).eos_token_ids == {EOS}
    two = save_gguf(checkpoint, tmp_path / "two.gguf", tokenizer__ggml__eot_token_id=9)
    assert load(two).eos_token_ids == {EOS, 9}
    tokens = [*TOKENS[:EOS], "<|im_end|>", *TOKENS[EOS + 1 :]]
    named = save_gguf(
        checkpoint,
        tmp_path / "named.gguf",
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=[
            3 if "|" in token or token == "<bos>" else 1 for token in tokens
        ],
        tokenizer__ggml__eos_token_id=7,
    )
    assert load(named).eos_token_ids == {EOS, 7}


def test_an_engine_completes_as_transformers_does(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", Qwen2Config)
    model = load(save_gguf(checkpoint, tmp_path / "m.gguf"))
    engine = engine_for(model)
    engine.submit(request("r", TEXT, cache_policy=CachePolicy(preset="full")))
    want = plain(checkpoint).generate(
        torch.tensor([TEXT]),
        attention_mask=torch.ones(1, len(TEXT), dtype=torch.int64),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=VOCABULARY - 1,
    )
    assert tokens(run(engine)["r"]) == want[0, len(TEXT) :].tolist()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"blk.1.ffn_up.weight": None}, r"weights are missing: .*layers\.1\.mlp\.up_proj\.weight"),
        ({"blk.0.attn_sinks.weight": np.ones(4, np.float32)}, r"tensor blk\.0\.attn_sinks\.weight"),
        ({"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}, r"tensor blk\.0\.attn_q_norm"),
        ({"blk.0.ffn_gate.bias": np.ones(96, np.float32)}, r"ffn_gate\.bias"),
        ({"blk.7.ffn_up.weight": np.ones((96, 64), np.float32)}, r"blk\.7\.ffn_up\.weight"),
        ({"blk.0.attn_v.weight": np.ones((64, 64), np.float32)}, r"\[64, 64\], .* \[32, 64\]"),
    ],
)
def test_weights_that_are_missing_or_have_no_place_are_named(
    tensors: dict[str, Any], says: str, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    path = save_gguf(checkpoint, tmp_path / "m.gguf", tensors=tensors)
    for read in (load, lambda path: read_model_spec(str(path))):
        with pytest.raises((NotFound, Unsupported), match=says) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_rows_are_stored_in_rotation_pairs() -> None:
    rows = torch.arange(8)[:, None]
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
