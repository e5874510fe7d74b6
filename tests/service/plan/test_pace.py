"""Times, replicas and prices of a plan, recomputed by hand; and refused options."""

import math
from pathlib import Path
from typing import Any

import pytest

from a2sf.errors import InvalidArgument
from service.plan import units
from tests.service.planning import planned, refused, shown

# The packaged model in bfloat16: 6 layers of 4 KV heads of 32, two query heads each.
PARAMETERS, HEAD = 5_401_856, 4096 * 256
SLOTS = 6 * 4 * 100
HELD = SLOTS * (2 * 32 * 2 + 12)
ATTENTION = 6 * 8 * 100 * 4 * 32
SCORING = SLOTS + 2 * SLOTS
LOAD = ("--prompt-tokens", 300, "--completion-tokens", 200)
SMALL = ("--budget", 100, "--max-batch", 10)
RATES = ("--bandwidth", "1GB/s", "--compute", "1TFLOP/s")


def test_a_step_bound_by_memory_takes_its_bytes_over_the_bandwidth() -> None:
    plan = planned(*SMALL, *RATES)
    pace, weights = plan["this_cache"]["pace"], plan["weights"]
    assert (weights["parameters"], weights["head_parameters"]) == (PARAMETERS, HEAD)
    # The head is the embedding, so all weights are read; and so is the rotation's little buffer.
    assert pace["step_nbytes"] == weights["nbytes"] + 10 * HELD
    assert weights["nbytes"] == 2 * PARAMETERS + 128
    assert pace["step_s"] == pytest.approx(pace["step_nbytes"] / 1e9)
    assert pace["taken_from"] == "memory"
    assert pace["tokens_per_s"] == pytest.approx(10 / pace["step_s"])
    full_cache = plan["full_cache"]["pace"]
    assert full_cache["step_nbytes"] == weights["nbytes"] + 10 * 1024 * 6 * 4 * 2 * 32 * 2


def test_a_step_reports_its_bytes_for_scores() -> None:
    plan = planned(*SMALL, *RATES)
    this_cache, full_cache = plan["this_cache"]["pace"], plan["full_cache"]["pace"]
    # Position and score are read, the score is written: three numbers of four bytes.
    assert (this_cache["scores_nbytes"], full_cache["scores_nbytes"]) == (10 * SLOTS * 12, 0)
    vectors = 10 * SLOTS * 2 * 32 * 2
    assert (
        this_cache["step_nbytes"]
        == plan["weights"]["nbytes"] + vectors + this_cache["scores_nbytes"]
    )
    lines = shown(*SMALL, *RATES).splitlines()
    assert f"{'    of these for scores':<28}{10 * SLOTS * 12:>18,}{0:>18}" in lines
    assert any("writes the score: 12 bytes" in line for line in lines)


def test_a_step_bound_by_compute_takes_its_operations() -> None:
    pace = planned(*SMALL, "--bandwidth", "9TB/s", "--compute", "1GFLOP/s")["this_cache"]["pace"]
    assert pace["step_operations"] == 10 * (2 * PARAMETERS + ATTENTION + SCORING)
    assert pace["step_s"] == pytest.approx(pace["step_operations"] / 1e9)
    assert pace["taken_from"] == "compute"


def test_an_embedding_that_is_only_looked_up_is_not_read() -> None:
    model = Path(__file__).resolve().parents[3] / "docs" / "models" / "8b"
    weights = planned("--model", model, *SMALL)["weights"]
    assert weights["nbytes"] - weights["step_nbytes"] == 2 * 128256 * 4096
    assert weights["parameters"] - weights["step_parameters"] == 128256 * 4096


def test_scoring_is_counted_separately_from_attention() -> None:
    cache = planned(*SMALL)["this_cache"]
    assert cache["scoring_multiplications"] == SLOTS
    assert cache["scoring_additions"] == 2 * SLOTS
    assert cache["attention_operations"] == ATTENTION


def test_a_sequence_below_the_budget_holds_only_its_own_tokens() -> None:
    cache = planned(*SMALL, "--context", 40)["this_cache"]
    assert cache["attention_operations"] == ATTENTION * 40 // 100


def test_prompts_are_read_exactly_at_the_peak() -> None:
    pace = planned(*SMALL, *RATES, *LOAD)["this_cache"]["pace"]
    attention = 6 * 8 * 4 * 32 * 300 * 301 // 2
    operations = 300 * 2 * (PARAMETERS - HEAD) + attention + 2 * HEAD
    assert pace["prompt_s"] == pytest.approx(operations / 1e12)


MEASURED = (*SMALL, "--step-ms", 20, "--prefill-tokens-per-s", 1000)


def test_a_measured_step_replaces_the_bound_and_applies_only_to_this_cache() -> None:
    plan = planned(*MEASURED, *RATES)
    pace = plan["this_cache"]["pace"]
    assert (pace["step_s"], pace["taken_from"], pace["tokens_per_s"]) == (0.02, "measured", 500)
    assert plan["full_cache"]["pace"] is None
    text = shown(*MEASURED)
    assert "Times, as measured" in text
    assert "bounds" not in text


@pytest.mark.parametrize(
    ("load", "busy_s"),
    [
        # 300 prompt tokens take 0.3 s, 200 tokens a tenth of 200 steps of 20 ms: 0.4 s.
        (("--requests-per-s", 10, *LOAD), 10 * 0.7),
        (("--requests-per-s", 0.5, *LOAD), 0.5 * 0.7),
        (("--tokens-per-s", 2000), 2000 * 0.002),
    ],
    ids=["many requests", "few requests", "tokens"],
)
@pytest.mark.parametrize("utilisation", [0.5, 0.7, 1.0])
def test_replicas_are_the_busy_seconds_over_the_utilisation(
    load: tuple[Any, ...], busy_s: float, utilisation: float
) -> None:
    pace = planned(*MEASURED, *load, "--utilisation", utilisation)["this_cache"]["pace"]
    assert pace["replicas"] == math.ceil(round(busy_s / utilisation, 9))


def test_the_price_of_tokens_is_the_price_of_their_time() -> None:
    price = ("--price-per-hour", 3.6, "--utilisation", 0.5)
    pace = planned(*MEASURED, *price)["this_cache"]["pace"]
    # A thousandth a second, 2 ms of it a token, at half use.
    assert pace["price_per_million"] == pytest.approx(0.001 * 0.002 / 0.5 * 1e6)
    pace = planned(*MEASURED, *price, *LOAD)["this_cache"]["pace"]
    assert pace["price_per_million"] == pytest.approx(0.001 * 0.7 / 200 / 0.5 * 1e6)


def test_options_override_the_figures_of_a_named_gpu() -> None:
    times = planned("--budget", 100, "--gpu", "h200", "--compute", "1PFLOP/s")["times_from"]
    assert (times["bandwidth"], times["compute"]) == (4_800 * 10**9, 10**15)
    plan = planned("--budget", 100, "--gpu", "h200", "--gpu-memory", "10GiB")
    assert plan["memory"]["device_bytes"] == 10 * 2**30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", 4, "--gpu", "l4"), "--budget: 4; accepted: 5 (sinks and the newest"),
        (("--budget", 50), "accepted: a size such as 80GB, or instead --gpu with"),
        ((*SMALL, "--slots", 99), "--slots: 99; accepted: 100"),
        ((*SMALL, "--device", "cuda:0"), "--device: 'cuda:0'; accepted: cuda, cpu"),
        ((*SMALL, "--dtype", "int8"), "accepted: auto, float64"),
        ((*SMALL, "--gpu", "h300"), "accepted: l4, l40s"),
        ((*SMALL, "--context", 1025), "--context: 1025; accepted: at most 1024"),
        ((*SMALL, "--model", "/no/such"), "no such directory"),
        ((*SMALL, "--default-table", "x"), "no alpha table 'x'"),
        ((*SMALL, "--tables", "/no/such", "--default-table", "x"), "/no/such: no such directory"),
        (("--budget", 50, "--gpu-memory", "10MB"), "one row need"),
        (("--budget", 50, "--gpu-memory", "10MB", "--max-batch", 3), "one row need"),
        ((*SMALL, "--utilisation", 0), "--utilisation: 0; accepted"),
        ((*SMALL, "--utilisation", 1.1), "--utilisation: 1.1; accepted"),
        ((*SMALL, "--step-ms", 0), "--step-ms: 0; accepted: more than 0"),
        ((*SMALL, "--step-ms", "nan"), "--step-ms: nan; accepted: more than 0"),
        (("--budget", 50, "--gpu", "l4", "--step-ms", 1), "--step-ms: needs --max-batch"),
        ((*SMALL, "--price-per-hour", 1), "--bandwidth: missing"),
        ((*SMALL, *RATES, "--requests-per-s", 1), "--requests-per-s: needs --prompt-tokens"),
        ((*SMALL, "--bandwidth", "1GB/s", *LOAD), "--prompt-tokens: prefill takes time"),
        ((*SMALL, *RATES, "--prompt-tokens", 9), "--prompt-tokens: needs --completion-tokens"),
        ((*MEASURED, *LOAD, "--requests-per-s", 1, "--tokens-per-s", 1), "cannot be combined with"),
        ((*MEASURED, "--prompt-tokens", 900, "--completion-tokens", 200), "the model's context"),
        ((*MEASURED, *LOAD, "--max-prefill-tokens", 99), "give --max-prefill-tokens 300 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_plan_options_are_refused_by_name(arguments: tuple[Any, ...], message: str) -> None:
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        *[("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("1.5 TB", 15 * 10**11)],
        *[("7B", 7), ("0.5KiB", 512), ("3kB", 3000), ("2MiB", 2 * 2**20)],
    ],
)
def test_sizes_are_read_to_the_byte(text: str, nbytes: int) -> None:
    assert units.parse_size("--gpu-memory", text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "80", "80gb", "80Gb", "80G", "80KB", "-1GB", "1e3GB", "80GB/s", "1_0GB", "0GB", "٣GB"],
)
def test_invalid_sizes_are_refused_with_the_accepted_units(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^--gpu-memory: .*accepted: .*80GB"):
        units.parse_size("--gpu-memory", text)


def test_rates_are_read_with_their_own_units() -> None:
    assert units.parse_bandwidth("--bandwidth", "4.8TB/s") == 4_800 * 10**9
    assert units.parse_compute("--compute", "0.5PFLOP/s") == 5 * 10**14
    for parse in (units.parse_bandwidth, units.parse_compute):
        with pytest.raises(InvalidArgument, match="accepted"):
            parse("--rate", "80GB")


@pytest.mark.parametrize(
    ("text", "nbytes"), [("0", 0), ("12.5%", 125), ("0%", 0), ("1kB", 1000), ("99.9%", 999)]
)
def test_a_reserve_is_a_size_or_a_share(text: str, nbytes: int) -> None:
    assert units.parse_reserve("--reserve", text, 1000) == nbytes


@pytest.mark.parametrize("text", ["100%", "-1%", "a lot", "10 percent", "10"])
def test_invalid_reserves_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^--reserve: .*accepted"):
        units.parse_reserve("--reserve", text, 1000)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**34, "16.0 GiB"),
        (5 * 2**50, "5,120.0 TiB"),
    ],
)
def test_bytes_are_written_with_binary_prefixes(nbytes: int, text: str) -> None:
    assert units.binary(nbytes) == text
