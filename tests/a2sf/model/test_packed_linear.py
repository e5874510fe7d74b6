"""A packed linear layer equals the layer that it replaces, up to rounding."""

import pytest
import torch
from torch.nn import Embedding, Linear, Module, Sequential

from a2sf.model.loader import LoadedModel
from a2sf.model.packed_linear import PACKED_DTYPES, PackedLinear, computed_rows, pack, packs

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("dtype", [dtype for dtype in PACKED_DTYPES if packs(dtype)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 96), (3, 7, 96), (300, 96)])
def test_a_packed_layer_equals_the_layer(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = Linear(96, 33, bias=bias, dtype=dtype)
    values = torch.randn(shape, dtype=dtype)
    with torch.inference_mode():
        want = torch.nn.functional.linear(
            values.double(), layer.weight.double(), layer.bias.double() if bias else None
        )
        got = PackedLinear.of(layer)(values)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=8 * torch.finfo(dtype).eps)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_of_any_dtype_computes_the_same_after_pack(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    layer = Linear(96, 33, dtype=dtype)
    module = Sequential(layer)
    values = torch.randn(3, 96, dtype=dtype)
    want = torch.nn.functional.linear(values.double(), layer.weight.double(), layer.bias.double())
    pack(module)
    assert isinstance(module[0], PackedLinear) == packs(dtype)
    got = module(values).detach()
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=8 * torch.finfo(dtype).eps)


def test_few_distinct_row_counts_are_computed_with_little_padding() -> None:
    sizes = {rows: computed_rows(rows) for rows in range(1, 5000)}
    assert all(rows <= computed for rows, computed in sizes.items())
    assert all(computed == rows for rows, computed in sizes.items() if rows <= 16)
    assert all(computed < 2 * rows for rows, computed in sizes.items())
    assert len({computed for rows, computed in sizes.items() if rows <= 512}) < 30


class Scaled(Linear):
    """A subclass that computes something else."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(values)


@needs_onednn
def test_other_layers_and_dtypes_are_not_packed() -> None:
    module = Sequential(
        Linear(8, 8), Sequential(Linear(8, 8)), Scaled(8, 8), Linear(8, 8, dtype=torch.float64)
    )
    pack(module)
    kinds = [type(child) for child in (module[0], module[1][0], module[2], module[3])]
    assert kinds == [PackedLinear, PackedLinear, Scaled, Linear]


@needs_onednn
def test_a_tied_embedding_still_works_after_packing() -> None:
    class Tied(Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = Embedding(9, 4)
            self.head = Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

    tied = Tied()
    ids = torch.arange(9)
    before = tied.head(tied.embedding(ids)).detach()
    pack(tied)
    torch.testing.assert_close(tied.head(tied.embedding(ids)), before)


@needs_onednn
def test_all_layers_are_packed_in_float32_and_none_in_float64(
    tiny_model: LoadedModel, tiny_model_64: LoadedModel
) -> None:
    assert not any(type(child) is Linear for child in tiny_model.module.modules())
    assert not any(isinstance(child, PackedLinear) for child in tiny_model_64.module.modules())
