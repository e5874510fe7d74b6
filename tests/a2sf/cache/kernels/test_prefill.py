"""The fused `attention_sum` of a prompt's block equals torch's, without attention rows."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")

from triton.runtime.interpreter import InterpreterBuilder

from a2sf.cache import attention, scoring
from a2sf.cache.kernels import prefill, prefill_programs
from tests.interpreting import CUDA, interpreting, poisoned
from tests.prompt_cases import check_flash, check_mass


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with interpreting(prefill_programs):
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use tiles so small that tens of tokens take several, and fill new memory with NaN."""
    monkeypatch.setattr(prefill, "QUERIES", 16)
    monkeypatch.setattr(prefill, "TILE_ELEMENTS", 512)
    with poisoned():
        yield


@pytest.mark.parametrize("seed", range(16))
def test_the_attention_sum_of_a_block_equals_the_reference(seed: int) -> None:
    check_mass(seed)


@pytest.mark.parametrize("seed", range(4))
def test_normalisers_from_flash_attention_give_the_same_sums(seed: int) -> None:
    check_mass(seed, known=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16, 116))
def test_the_attention_sum_of_any_block_equals_the_reference(seed: int) -> None:
    check_mass(seed)


@pytest.mark.skipif(CUDA, reason="counts the interpreter's products")
def test_queries_with_weight_0_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda *rest: products.append(1) or dot(*rest)
    )
    width, dim = 64, 16
    query = torch.randn(1, 1, width, dim, generator=torch.Generator().manual_seed(0))
    position = torch.arange(width, dtype=torch.int32)[None, None]
    at = torch.arange(width)[None]
    for alpha, count in ((0.3, 4), (0.0, 4), (1.0, 4 * 2 + 4 + 2)):
        weights = scoring.query_weights(
            torch.tensor([[[alpha]]], dtype=torch.float64), torch.tensor([width]), 0, width
        )[0]
        products.clear()
        got = prefill.attention_sum(query, at, query, position, weights, 0.4)
        want = attention.attention_sum(query, at, query, position, weights, 0.4)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
        # There are four tiles of queries and two of slots. At .3 and 0 only the last queries have a
        # weight. At 1 all have one, but the earlier queries do not attend to the later slots.
        assert len(products) == count


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [64, 200])
def test_flash_attention_equals_attention_by_position(dtype: torch.dtype, slots: int) -> None:
    if not CUDA:
        pytest.skip("no CUDA device on this machine")
    check_flash(dtype, 64, slots)
