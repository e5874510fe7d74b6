"""dtype auto depends on the processor's units and a measurement, and reports the reason."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from a2sf.errors import InvalidArgument
from a2sf.model import dtypes, linear
from a2sf.model.dtypes import bfloat16_speedups, bfloat16_unit
from a2sf.model.loader import load_model
from a2sf.model.spec import read_model_spec

CONFIG = LlamaConfig(hidden_size=64, intermediate_size=96, dtype=torch.float16)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulate a processor with these units and these speed-ups of bfloat16."""

    def let(*ratios: float, native: bool = True, **units: bool) -> None:
        monkeypatch.setattr(dtypes, "bfloat16_unit", bfloat16_unit)
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: MappingProxyType(units), raising=False
        )
        monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: native)
        measured = dict(enumerate(ratios))
        monkeypatch.setattr(
            dtypes, "bfloat16_speedups", lambda _: measured or pytest.fail("something was measured")
        )

    return let


@pytest.mark.parametrize(
    ("unit", "called"),
    [("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "Arm's BF16")],
)
def test_auto_is_bfloat16_if_the_processor_supports_it_and_it_is_faster(
    unit: str, called: str, processor: Any
) -> None:
    processor(1.3, 8.0, avx2=True, **{unit: True})
    chosen = dtypes.choose("auto", "cpu", CONFIG)
    assert chosen.dtype == torch.bfloat16
    assert chosen.reason == f"with {called}, bfloat16 is at least 1.30 times as fast here"


def test_auto_is_float32_if_bfloat16_is_not_faster_for_every_size(processor: Any) -> None:
    processor(8.0, 1.1, amx_bf16=True)
    chosen = dtypes.choose("auto", "cpu", CONFIG)
    assert chosen.dtype == torch.float32
    assert chosen.reason == "with AMX-BF16, bfloat16 is at least 1.10 times as fast here"


@pytest.mark.parametrize("units", [{}, {"avx2": True, "amx_bf16": False, "avx512_bf16": False}])
def test_auto_is_float32_without_a_measurement_if_there_is_no_unit(
    units: dict[str, bool], processor: Any
) -> None:
    processor(**units)
    chosen = dtypes.choose("auto", "cpu", CONFIG)
    assert chosen.dtype == torch.float32
    assert chosen.reason == "the processor does not multiply bfloat16 in hardware"


def test_auto_is_float32_if_torch_does_not_use_the_unit(processor: Any) -> None:
    processor(native=False, amx_bf16=True)
    chosen = dtypes.choose("auto", "cpu", CONFIG)
    assert (chosen.name, chosen.reason) == (
        "float32",
        "torch makes no use of the processor's AMX-BF16",
    )


def test_auto_is_float32_if_torch_cannot_report_the_unit(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(amx_bf16=True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    chosen = dtypes.choose("auto", "cpu", CONFIG)
    assert chosen.name == "float32"
    assert "does not say whether the processor has bfloat16" in chosen.reason


def test_processes_that_share_a_model_do_not_measure(processor: Any) -> None:
    processor(amx_bf16=True)
    chosen = dtypes.choose("auto", "cpu", CONFIG, processes=2)
    assert (chosen.name, chosen.reason) == ("float32", "several processes share the model")


def test_on_a_gpu_auto_is_the_stored_dtype(processor: Any) -> None:
    processor(amx_bf16=True)
    chosen = dtypes.choose("auto", "cuda", CONFIG)
    assert (chosen.name, chosen.reason) == ("float16", "as stored")
    unsaid = dtypes.choose("auto", "cuda", LlamaConfig(dtype=None))
    assert unsaid.name == "bfloat16"


@pytest.mark.parametrize("asked", list(dtypes.DTYPES))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_requested_dtype_is_used(asked: str, device: str, processor: Any) -> None:
    processor(9.0, amx_bf16=True)
    chosen = dtypes.choose(asked, device, CONFIG)
    assert (chosen.name, chosen.reason) == (asked, "asked for")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"'int8'; accepted: auto, float64, float32"):
        dtypes.check("int8")


def test_the_measurement_covers_both_dtypes_and_all_numbers_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []

    def seconds(layer: Any, values: torch.Tensor) -> float:
        given.append((values.dtype, tuple(values.shape)))
        # The first product of each dtype is not measured; it takes much longer.
        first = given.count(given[-1]) == 1
        return (100.0 if first else 1.0) * (3.0 if values.dtype == torch.float32 else 2.0)

    monkeypatch.setattr(dtypes, "_seconds", seconds)
    assert bfloat16_speedups(CONFIG) == {16: 1.5, 128: 1.5}
    assert given[:2] == [(torch.float32, (16, 64)), (torch.bfloat16, (16, 64))]
    assert len(given) == 2 * 2 * 6


def test_a_model_and_its_spec_have_the_same_dtype_and_reason(
    processor: Any, tiny_model_dir: Path
) -> None:
    processor(2.0, amx_bf16=True)
    spec = read_model_spec(str(tiny_model_dir), device_type="cpu")
    assert spec.dtype == torch.bfloat16
    assert "AMX-BF16" in spec.dtype_reason
    model = load_model(str(tiny_model_dir), device="cpu")
    assert (model.dtype, model.dtype_reason) == (spec.dtype, spec.dtype_reason)
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
