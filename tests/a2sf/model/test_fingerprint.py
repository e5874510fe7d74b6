"""A model's fingerprint does not depend on the spelling of its settings."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from a2sf import reference
from a2sf.errors import TableMismatch
from a2sf.model import families, fingerprint
from a2sf.model.fingerprint import canonical_rotation
from a2sf.model.loader import load_model
from a2sf.schema import LoadedIdentity, ModelIdentity
from a2sf.tablefile import canonical_json, load_table, parse_table, save_table
from service.backend.loading import load_core
from service.config.options import ServerOptions
from tests.tables import IDENTITY, make_table
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[3]

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}

# Each list has spellings of one rotation: of transformers 5, of older files, with whole numbers,
# with settings at their defaults, and with settings that are not read.
SAME: dict[str, list[dict[str, Any]]] = {
    "default": [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
        {"rope_theta": 10000},
        {"rope_theta": 10000.0, "rope_scaling": None},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 1}},
        {"rope_theta": 10000.0, "torch_dtype": "float32", "dtype": None},
    ],
    "another base": [{"rope_theta": 500000}, {"rope_parameters": {"rope_theta": 5e5}}],
    "linear": [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4}},
    ],
    "another factor": [{"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}],
    "llama3": [
        {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4, **LLAMA3}},
        {"rope_theta": 10000, "rope_scaling": {"type": "llama3", "factor": 4, **LLAMA3}},
    ],
    "another llama3": [
        {
            "rope_theta": 10000,
            "rope_scaling": {"rope_type": "llama3", "factor": 4, **LLAMA3, "low_freq_factor": 2},
        }
    ],
    "yarn": [
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 128,
            }
        },
        {
            "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4,
                "original_max_position_embeddings": 128,
                "beta_fast": 32,
                "beta_slow": 1.0,
                "truncate": True,
            },
        },
        {
            "rope_theta": 1e4,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 1.138629436111989,
                "mscale": 2.0,
            },
        },
    ],
    "another original context": [
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {
            "rope_theta": 1e4,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "mscale": 0,
                "mscale_all_dim": 1.0,
            },
        },
    ],
    "another scale": [
        {
            "rope_theta": 1e4,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 1.0,
            },
        },
        {
            "rope_theta": 1e4,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "mscale": 1,
                "mscale_all_dim": 1,
            },
        },
    ],
    "another beta": [
        {
            "rope_theta": 1e4,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 4,
            },
        },
    ],
    "not truncated": [
        {
            "rope_theta": 1e4,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "truncate": truncate,
            },
        }
        for truncate in (False, None)
    ],
    "half of each head": [
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 0.5}},
    ],
    "all of each head": [
        {"rope_theta": 1e4, "partial_rotary_factor": 1},
        {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 1.0}},
    ],
}


def write_rope(directory: Path, spelling: dict[str, Any]) -> Path:
    """Replace the rotation in a checkpoint's config.json by this spelling."""
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    for name in ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"):
        settings.pop(name, None)
    path.write_text(json.dumps({**settings, **spelling}))
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "checkpoint"))


def identity_of(directory: Path) -> ModelIdentity:
    return load_model(str(directory), device="cpu").identity


def earlier_rule(directory: Path) -> str:
    """The fingerprint of older versions, which hashed the spelling, written out."""
    config = AutoConfig.from_pretrained(directory)
    settings = {
        "architecture": config.architectures[0],
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "rope": config.rope_parameters,
    }
    digest = hashlib.sha256(canonical_json(settings).encode())
    weights = load_file(directory / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        stored = weights[f"model.layers.{layer}.self_attn.k_proj.weight"]
        digest.update(stored.numpy().tobytes()[:4096])
    return digest.hexdigest()


WHOLE_HEADS = [name for name in SAME if name not in ("half of each head", "all of each head")]


@pytest.mark.parametrize("name", WHOLE_HEADS)
def test_the_fingerprint_does_not_depend_on_the_spelling_of_the_rotation(
    name: str, checkpoint: Path
) -> None:
    found = {identity_of(write_rope(checkpoint, settings)).fingerprint for settings in SAME[name]}
    assert len(found) == 1
    others = {
        identity_of(write_rope(checkpoint, SAME[other][0])).fingerprint
        for other in WHOLE_HEADS
        if other != name
    }
    assert not found & others


@pytest.mark.parametrize("architecture", families.SUPPORTED_ARCHITECTURES)
def test_canonical_rotations_are_equal_exactly_if_their_frequencies_are(
    architecture: str, tmp_path: Path
) -> None:
    config_class = getattr(transformers, architecture).config_class
    # head_dim 64, so that different rotations differ in at least one frequency.
    directory = save_tiny(config_class, tmp_path, num_hidden_layers=1, hidden_size=256, head_dim=64)
    found: dict[str, set[tuple[Any, ...]]] = {}
    computed: dict[tuple[Any, ...], set[str]] = {}
    for settings in (settings for spellings in SAME.values() for settings in spellings):
        try:
            config = AutoConfig.from_pretrained(write_rope(directory, settings))
            rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
        except Exception:
            # Phi-3 accepts only the default rotation.
            assert architecture == "Phi3ForCausalLM"
            continue
        spelled = canonical_json(
            canonical_rotation(
                config.rope_parameters, 512, partial=architecture in families.ROTATE_IN_PART
            )
        )
        numbers = (rotary.inv_freq * 1e6).round().tolist()
        computes = (round(rotary.attention_scaling, 6), *numbers)
        found.setdefault(spelled, set()).add(computes)
        computed.setdefault(computes, set()).add(spelled)
    assert len(found) > 2
    assert [spelled for spelled, computes in found.items() if len(computes) > 1] == []
    assert [spelled for spelled in computed.values() if len(spelled) > 1] == []


def test_head_dim_may_be_given_or_derived(tmp_path: Path) -> None:
    given = {"head_dim": 8}, {"head_dim": None}, {}
    found = set()
    for index, head_dim in enumerate(given):
        directory = save_tiny(transformers.LlamaConfig, tmp_path / str(index))
        path = directory / "config.json"
        settings = json.loads(path.read_text())
        del settings["head_dim"]
        path.write_text(json.dumps({**settings, **head_dim}))
        found.add(identity_of(directory).fingerprint)
    assert len(found) == 1


def test_every_supported_rotation_has_its_settings_listed() -> None:
    assert set(fingerprint._ROTATION_SETTINGS) == set(families.SUPPORTED_ROPE_TYPES)


@pytest.mark.parametrize("fitted", range(len(SAME["linear"])))
@pytest.mark.parametrize("served", range(len(SAME["linear"])))
def test_an_older_table_is_served_for_any_spelling_of_the_model(
    fitted: int, served: int, checkpoint: Path, tmp_path: Path
) -> None:
    write_rope(checkpoint, SAME["linear"][fitted])
    identity = identity_of(checkpoint)
    old = ModelIdentity(
        **{**identity.model_dump(), "id": "old", "fingerprint": earlier_rule(checkpoint)}
    )
    (tmp_path / "tables").mkdir()
    for name, model in (("before", old), ("now", identity)):
        save_table(make_table(model, name=name), tmp_path / "tables" / f"{name}.json")
    write_rope(checkpoint, SAME["linear"][served])
    core = load_core(
        ServerOptions(
            model=str(checkpoint), device="cpu", tables=tmp_path / "tables", default_table="before"
        )
    )
    assert set(core.tables.now.tables) == {"before", "now"}
    assert not core.tables.now.refused


def test_a_table_stores_only_one_fingerprint(checkpoint: Path) -> None:
    identity = identity_of(checkpoint)
    assert isinstance(identity, LoadedIdentity)
    assert identity.earlier
    table = make_table(identity)
    assert type(table.model) is ModelIdentity
    assert parse_table(table.model_dump_json().encode()) == table
    assert identity.earlier[0] not in table.model_dump_json()


def test_the_packaged_tables_fit_the_packaged_model() -> None:
    identity = load_model("reference", device="cpu").identity
    paths = [*(reference.path() / "tables").glob("*.json")]
    paths += (ROOT / "benchmarks" / "tables").glob("*.json")
    assert len(paths) > 1
    for path in paths:
        assert load_table(path, identity).model.fingerprint == identity.fingerprint


def test_a_table_of_another_rotation_is_refused_with_the_model_s_settings(checkpoint: Path) -> None:
    table = make_table(identity_of(checkpoint))
    other = identity_of(write_rope(checkpoint, {"rope_theta": 500000}))
    with pytest.raises(TableMismatch) as caught:
        table.check_model(other)
    assert "rope settings that are hashed with them" in str(caught.value)
    assert (
        "head_dim 8, hidden_size 32, vocab_size 258, rope_theta 500000.0, rope_type default"
        in str(caught.value)
    )


def test_another_revision_of_a_model_is_named_in_the_message() -> None:
    fitted = IDENTITY.model_copy(update={"revision": "v1"})
    served = IDENTITY.model_copy(update={"revision": "v2", "fingerprint": "b" * 64})
    with pytest.raises(TableMismatch, match="revision is 'v1' in the table and 'v2' in the"):
        make_table(fitted).check_model(served)
