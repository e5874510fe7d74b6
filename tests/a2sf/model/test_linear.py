"""A linear layer on a processor equals torch's, up to rounding, for any number of rows."""

import pytest
import torch
from torch.nn import Embedding, Linear, Module, Sequential

from a2sf.model import linear
from a2sf.model.linear import MOST_ROWS, ProcessorLinear, accelerate
from a2sf.model.loader import LoadedModel
from a2sf.native import products

DTYPES = [torch.float32, torch.bfloat16]


def exact(layer: Linear, values: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return torch.nn.functional.linear(values.double(), layer.weight.double(), bias)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sides", [(96, 33), (7, 300), (1, 1), (1030, 70)])
@pytest.mark.parametrize(
    "rows", [(), (0,), (1, 1), (2,), (3,), (1, 4), (3, 7), (MOST_ROWS,), (MOST_ROWS + 1,), (300,)]
)
def test_a_layer_equals_torch_s(
    dtype: torch.dtype,
    bias: bool,
    sides: tuple[int, int],
    rows: tuple[int, ...],
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(linear, "_BLOCK", 4000)
    torch.manual_seed(0)
    layer = Linear(*sides, bias=bias, dtype=dtype)
    values = torch.randn(*rows, sides[0], dtype=dtype)
    with torch.inference_mode():
        expected = exact(layer, values)
        module = Sequential(layer)
        accelerate(module)
        assert isinstance(module[0], ProcessorLinear)
        found = module(values)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_multiplies_few_rows_and_torch_many(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_kernel = []

    def multiply(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        by_kernel.append(values.numel() // 8)
        return torch.nn.functional.linear(values, weight, bias)

    monkeypatch.setattr(products, "multiply", multiply)
    layer = ProcessorLinear.take_over(Linear(8, 5, dtype=dtype))
    with torch.inference_mode():
        for rows in (1, MOST_ROWS, MOST_ROWS + 1):
            layer(torch.randn(rows, 8, dtype=dtype))
    assert by_kernel == [1, MOST_ROWS]


def test_without_onednn_bfloat16_is_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert not linear.multiplies_bfloat16()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_need_not_be_contiguous(dtype: torch.dtype) -> None:
    layer = Linear(8, 5, dtype=dtype)
    values = torch.randn(8, 3, dtype=dtype).T
    with torch.inference_mode():
        expected = exact(layer, values)
        found = ProcessorLinear.take_over(layer)(values)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_a_finite_result_does_not_affect_others(
    dtype: torch.dtype, bad: float
) -> None:
    layer = ProcessorLinear.take_over(Linear(40, 9, dtype=dtype))
    values = torch.randn(6, 40, dtype=dtype)
    with torch.inference_mode():
        expected = layer(values)
        values[2, 3] = bad
        found = layer(values)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=0)
    assert not found[2].isfinite().any()


def test_a_layer_has_gradients() -> None:
    plain, layer = Linear(6, 4), ProcessorLinear.take_over(Linear(6, 4))
    layer.load_state_dict(plain.state_dict())
    values = torch.randn(3, 6)
    gradients = []
    for module in (plain, layer):
        given = values.clone().requires_grad_()
        module(given).square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)


class Scaled(Linear):
    """A subclass that computes something else."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(values)


def test_other_layers_and_dtypes_stay() -> None:
    module = Sequential(
        Linear(8, 8), Sequential(Linear(8, 8)), Scaled(8, 8), Linear(8, 8, dtype=torch.float64)
    )
    accelerate(module)
    kinds = [type(child) for child in (module[0], module[1][0], module[2], module[3])]
    assert kinds == [ProcessorLinear, ProcessorLinear, Scaled, Linear]


def test_a_tied_weight_stays_one_tensor() -> None:
    class Tied(Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = Embedding(9, 4)
            self.head = Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

    tied = Tied()
    accelerate(tied)
    assert tied.head.weight is tied.embedding.weight
    assert isinstance(tied.head, ProcessorLinear)


def test_a_loaded_model_has_these_layers_in_float32_and_not_in_float64(
    tiny_model: LoadedModel, tiny_model_64: LoadedModel
) -> None:
    assert not any(type(child) is Linear for child in tiny_model.module.modules())
    assert not any(isinstance(child, ProcessorLinear) for child in tiny_model_64.module.modules())
