"""The memory of a plan equals what the proposed server allocates, byte for byte."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from a2sf.cache.slot_shares import slots_per_head
from a2sf.model import dtypes, families
from a2sf.model.loader import LoadedModel, load_model
from a2sf.model.spec import read_model_spec
from a2sf.tablefile import save_table
from service.backend.loading import load_core
from service.config.settings import load
from tests.broken import added
from tests.families import save
from tests.service.planning import planned, refused, shown
from tests.tables import make_table
from tests.tiny import save_tiny_llama

ROOT = Path(__file__).resolve().parents[3]


def held_bytes(model: LoadedModel) -> int:
    """Bytes of the tensors that a loaded model holds."""
    module = model.module
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def proposed(plan: dict[str, Any]) -> Any:
    """What the server loads that the plan's last line starts."""
    assert plan["command"][:3] == ["python", "-m", "service"]
    return load_core(load(plan["command"][3:]).options)


def assert_allocates_what_was_planned(plan: dict[str, Any]) -> None:
    core, memory = proposed(plan), plan["memory"]
    assert core.engine.kv_slab_bytes == memory["slab_bytes"]
    assert core.engine.kv_staging_bytes == memory["staging_bytes"]
    assert held_bytes(core.model) == memory["weights_bytes"]
    assert (
        core.engine.kv_slab_bytes
        == plan["this_cache"]["rows"] * (plan["this_cache"]["sequence_bytes"])
    )


@pytest.mark.parametrize("dtype", ["auto", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "sizes",
    [
        ("--budget", 5, "--max-batch", 1),
        ("--budget", 200, "--gpu-memory", "100MB"),
        ("--budget", 48, "--slots", 168, "--max-batch", 3, "--max-prefill-tokens", 90),
    ],
    ids=lambda sizes: " ".join(map(str, sizes)),
)
@pytest.mark.parametrize("name", ["reference", "tiny"])
def test_the_server_allocates_the_planned_bytes(
    name: str, sizes: tuple[object, ...], dtype: str, tiny_model_dir: Path
) -> None:
    model = tiny_model_dir if name == "tiny" else name
    assert_allocates_what_was_planned(
        planned("--model", model, "--device", "cpu", "--dtype", dtype, *sizes)
    )


@pytest.mark.parametrize(
    "shares",
    [
        ((2.5, 2.5), (1.0, 1.0), (1.0, 1.0)),
        ((0.3, 0.5), (1.0, 3.0), (7.7, 0.9)),
        ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0)),
    ],
)
def test_a_table_that_splits_slots_shapes_plan_and_server_alike(
    shares: tuple[tuple[float, ...], ...],
    tiny_model: LoadedModel,
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    table = make_table(
        tiny_model.identity, head_share=shares, budget=None, budget_ratio=0.2, sinks=0, recent=0
    )
    save_table(table, tmp_path / "table.json")
    (tmp_path / "other.json").write_text("no table")
    given = ("--tables", tmp_path, "--default-table", table.name, "--budget", 64)
    plan = planned("--model", tiny_model_dir, "--device", "cpu", "--gpu-memory", "10MB", *given)
    slots = plan["this_cache"]["head_slots"]
    assert sum(map(sum, slots)) == 3 * 2 * 64
    assert tuple(map(tuple, slots)) == slots_per_head(64, shares, 512)
    assert_allocates_what_was_planned(plan)


def test_the_text_lists_the_slots_of_each_head_if_they_differ(
    long_model_dir: Path, tmp_path: Path
) -> None:
    shares = ((0.3, 0.5), (1.0, 3.0), (7.7, 0.9))
    identity = load_model(str(long_model_dir), device="cpu").identity
    table = make_table(identity, head_share=shares, budget=None, budget_ratio=0.2)
    save_table(table, tmp_path / "table.json")
    given = ("--tables", tmp_path, "--default-table", table.name, "--budget", 640)
    plan = shown("--model", long_model_dir, "--device", "cpu", "--max-batch", 2, *given)
    _, _, table_of_slots = plan.partition("one line per layer, one number per KV head\n")
    lines = [line.split() for line in table_of_slots.splitlines()[:3]]
    slots = slots_per_head(640, shares, 10**6)
    assert lines == [
        ["layer", f"{layer}", *(f"{one:,}" for one in row)] for layer, row in enumerate(slots)
    ]
    assert f"2 rows of {min(map(min, slots))} to {max(map(max, slots)):,} slots\n" in plan
    assert "Slots of a row" not in shown("--device", "cpu", "--max-batch", 2, "--budget", 640)


def test_the_slots_of_many_heads_continue_on_the_next_line(tmp_path: Path) -> None:
    model = save_tiny_llama(
        tmp_path / "model",
        hidden_size=240,
        num_attention_heads=30,
        num_key_value_heads=30,
        max_position_embeddings=10**6,
    )
    identity = load_model(str(model), device="cpu", dtype="float32").identity
    shares = ((4.0,) * 29 + (0.25,), (1.0,) * 30, (1.0,) * 30)
    save_table(make_table(identity, head_share=shares, sinks=0, recent=0), tmp_path / "t.json")
    given = ("--tables", tmp_path, "--default-table", "made-up", "--budget", 1000, "--slots", 8000)
    plan = shown("--model", model, "--device", "cpu", "--max-batch", 1, *given).splitlines()
    first = next(number for number, line in enumerate(plan) if line.startswith("Slots of a row"))
    lines = [line.split() for line in plan[first + 1 : first + 10]]
    assert [line[:2] == ["layer", str(number // 3)] for number, line in enumerate(lines)] == [
        number % 3 == 0 for number in range(9)
    ]
    assert [len(line) for line in lines[:3]] == [2 + 11, 11, 8]
    assert max(map(len, plan[first : first + 10])) <= 100


def test_a_table_that_the_server_would_refuse_is_refused(
    long_model_dir: Path, tmp_path: Path
) -> None:
    identity = load_model(str(long_model_dir), device="cpu").identity
    # A budget of 24 has no room for what it protects and the newest token: 25.
    shape = {"layer_share": (0.3, 1.0, 7.7), "budget": 24, "sinks": 2, "recent": 22}
    table = make_table(identity, **shape)
    save_table(table, tmp_path / "table.json")
    given = ("--tables", tmp_path, "--default-table", table.name, "--max-batch", 1)
    assert "cannot be the default" in refused("--model", long_model_dir, *given, "--budget", 240)
    assert "give --slots 241 or more" in refused("--model", long_model_dir, *given, "--budget", 200)


def test_no_head_is_planned_more_slots_than_the_longest_sequence_has_tokens() -> None:
    given = ("--device", "cpu", "--max-batch", 1, "--tables", ROOT / "benchmarks" / "tables")
    plan = planned(*given, "--default-table", "recall", "--budget", 100, "--slots", 512)
    slots = plan["this_cache"]["head_slots"]
    assert plan["model"]["max_context"] == 1024
    assert max(map(max, slots)) == 1024
    assert sum(map(sum, slots)) == 6 * 4 * 512
    assert_allocates_what_was_planned(plan)


def test_the_plan_says_that_slots_beyond_the_context_are_unused() -> None:
    given = ("--device", "cpu", "--max-batch", 1, "--budget")
    warning = "A sequence fills at most 1,024 slots of a head"
    assert warning in shown(*given, 1025)
    assert warning not in shown(*given, 1024)


def test_the_packaged_model_with_an_unequal_table() -> None:
    given = (
        "--tables",
        ROOT / "benchmarks" / "tables",
        "--default-table",
        "recall",
        "--budget",
        100,
    )
    plan = planned("--device", "cpu", "--gpu-memory", "1GiB", *given)
    slots = plan["this_cache"]["head_slots"]
    assert max(map(max, slots)) > 2 * 100
    by_the_formula = 6 * 4 * 100 * (2 * 32 * 4 + 8)
    assert plan["this_cache"]["sequence_bytes"] == by_the_formula
    assert_allocates_what_was_planned(plan)


def test_the_packaged_model_s_own_table_needs_no_directory() -> None:
    plan = planned("--device", "cpu", "--default-table", "mathqa", "--budget", 64, "--max-batch", 2)
    # Its layers are equal, so that a request may have the whole budget unasked.
    assert plan["command"][-4:-2] == ["--default-budget", "64"]
    assert_allocates_what_was_planned(plan)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", families.SUPPORTED_ARCHITECTURES)
def test_weights_take_the_planned_bytes_on_either_device(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    directory = save(architecture, tmp_path, tie_word_embeddings=tied)
    for dtype in ("float32", "bfloat16"):
        given = ("--model", directory, "--dtype", dtype, "--budget", 8, "--max-batch", 1)
        loaded = load_model(str(directory), device="cpu", dtype=dtype)
        for device in ("cpu", "cuda"):
            plan = planned("--device", device, *given)
            assert plan["memory"]["weights_bytes"] == held_bytes(loaded)
            assert plan["weights"]["stored_parameters"] == plan["weights"]["parameters"]


def test_config_json_alone_is_enough_for_a_plan(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    sizes = ("--budget", 50, "--gpu-memory", "20MB")
    bare, whole = (planned("--model", path, *sizes) for path in (tmp_path, tiny_model_dir))
    assert bare["weights"].pop("stored_parameters") is None
    assert whole["weights"].pop("stored_parameters") == bare["weights"]["parameters"]
    assert bare["weights"] == whole["weights"]
    assert bare["memory"] == whole["memory"]


def test_no_weights_are_fetched_from_the_hub(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(repository: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(tiny_model_dir)

    monkeypatch.setattr("a2sf.model.locate.snapshot_download", snapshot)
    plan = planned("--model", "org/name", "--budget", 50, "--max-batch", 1)
    assert asked == [["*.json"]]
    assert plan["command"][3:5] == ["--model", "org/name"]


def test_reading_a_model_spec_allocates_no_data() -> None:
    spec = read_model_spec(str(ROOT / "docs" / "models" / "8b"))
    tensors: list[Tensor] = [*spec.module.parameters(), *spec.module.buffers()]
    assert {tensor.device for tensor in tensors} == {torch.device("meta")}
    assert spec.dtype == torch.bfloat16


def test_a_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "truncated or damaged" in refused("--model", directory, "--budget", 8, "--max-batch", 1)


def test_an_lm_head_that_is_stored_twice_is_reported(tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    added("lm_head.weight", tensors["model.embed_tokens.weight"].clone())(directory)
    plan = shown("--model", directory, "--budget", 8, "--max-batch", 1)
    stored = sum(tensor.numel() for tensor in tensors.values()) + 258 * 32
    assert f"{stored:,} in the files' headers" in plan


def test_rows_fill_the_memory_beside_the_reserve() -> None:
    sizes = ("--budget", 100, "--gpu-memory", "1GB", "--reserve", "250MB")
    plan = planned(*sizes)
    memory, rows = plan["memory"], plan["this_cache"]["rows"]
    parts = ("weights_bytes", "staging_bytes", "slab_bytes", "reserve_bytes", "free_bytes")
    assert memory["reserve_bytes"] == 250 * 10**6
    assert sum(memory[part] for part in parts) == 10**9
    assert 0 <= memory["free_bytes"] < plan["this_cache"]["sequence_bytes"]
    assert planned(*sizes, "--max-batch", rows)["memory"] == memory
    assert f"accepted: at most {rows}" in refused(*sizes, "--max-batch", rows + 1)


def test_the_full_cache_holds_the_context_without_scores() -> None:
    plan = planned("--budget", 100, "--gpu-memory", "1GB", "--reserve", "0", "--context", 1000)
    full_cache, memory = plan["full_cache"], plan["memory"]
    assert full_cache["sequence_bytes"] == 1000 * 6 * 4 * 2 * 32 * 2
    room = 10**9 - memory["weights_bytes"]
    assert full_cache["rows"] == room // full_cache["sequence_bytes"]


EIGHT_B = ("--model", ROOT / "docs" / "models" / "8b", "--gpu", "h100", "--budget")
"""Its context is 131,072 tokens."""


@pytest.mark.parametrize(
    ("given", "context", "words"),
    [
        ((1024,), 8192, "of the model's 131,072; --context sets another"),
        ((10_000,), 10_000, "of the model's 131,072; --context sets another"),
        ((1024, "--context", 131_072), 131_072, "by --context"),
        (
            (1024, "--prompt-tokens", 3000, "--completion-tokens", 1000),
            4000,
            "prompt and completion of a request",
        ),
        (
            (1024, "--prompt-tokens", 3000, "--completion-tokens", 1000, "--context", 500),
            500,
            "by --context",
        ),
        ((1024, "--completion-tokens", 1000), 8192, "of the model's 131,072"),
    ],
)
def test_the_plan_compares_with_a_full_cache_of_the_length_that_is_planned_for(
    given: tuple[object, ...], context: int, words: str
) -> None:
    full_cache = planned(*EIGHT_B, *given)["full_cache"]
    assert (full_cache["context"], full_cache["sequence_bytes"]) == (
        context,
        context * 32 * 8 * 2 * 128 * 2,
    )
    assert f"  Full cache: {context:,} tokens a sequence, {words}" in shown(*EIGHT_B, *given)


def test_a_sequence_below_the_budget_counts_only_its_own_tokens() -> None:
    given = ("--budget", 100, "--max-batch", 1, "--context", 40)
    (line,) = [line for line in shown(*given).splitlines() if "tokens of a sequence kept" in line]
    assert line.split()[-2:] == ["40", "40"]


def test_a_full_cache_uses_a_short_models_whole_context() -> None:
    given = ("--budget", 100, "--gpu-memory", "1GB")
    assert planned(*given)["full_cache"]["context"] == 1024
    assert "1,024 tokens a sequence, the model's context; --context sets" in shown(*given)


def test_min_budget_is_checked_like_the_server_and_added_to_the_command() -> None:
    given = ("--budget", 100, "--max-batch", 1)
    assert "--min-budget" not in planned(*given)["command"]
    plan = planned(*given, "--min-budget", 30)
    assert "--min-budget 30" in " ".join(plan["command"])
    assert plan["memory"] == planned(*given)["memory"]
    assert "--min-budget: 101; accepted: 0 (none) to 100 (slots)" in refused(
        *given, "--min-budget", 101
    )


def test_the_reserve_defaults_to_a_tenth() -> None:
    assert planned("--budget", 100, "--gpu-memory", "1GB")["memory"]["reserve_bytes"] == 10**8


def test_a_cpu_plan_names_its_dtype(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "bfloat16_unit", lambda: ("AMX-BF16", ""))
    monkeypatch.setattr(dtypes, "bfloat16_speedups", lambda _: {16: 2.0, 128: 8.0})
    given = ("--model", tiny_model_dir, "--device", "cpu", "--budget", 8, "--max-batch", 1)
    plan = planned(*given)
    # A server on another machine might choose another, of which the plan would not be true.
    assert "--dtype bfloat16" in " ".join(plan["command"])
    assert plan["dtype"] == "bfloat16"
    why = "with AMX-BF16, bfloat16 is at least 2.00 times as fast here"
    assert plan["dtype_reason"] == why
    assert f"bfloat16 on cpu ({why})" in shown(*given)
    assert plan["memory"]["slab_bytes"] == 3 * 2 * 8 * (2 * 8 * 2 + 8)
    on_gpu = planned("--model", tiny_model_dir, "--budget", 8, "--max-batch", 1)
    assert "--dtype" not in on_gpu["command"]
