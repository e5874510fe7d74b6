"""The fused scoring of a prompt's block equals `attention.mass`, without its rows of attention."""

import random
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")

from triton.runtime.interpreter import InterpreterBuilder

from a2sf import attention, scoring
from a2sf.kernels import prefill, prefill_programs
from a2sf.scoring import EMPTY
from tests.a2sf.test_kernels_decode import CUDA, DEVICE, interpreting


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with interpreting(prefill_programs):
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that tens of tokens take several; fresh memory holds NaN."""
    monkeypatch.setattr(prefill, "QUERIES", 16)
    monkeypatch.setattr(prefill, "TILE_ELEMENTS", 512)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(seed: int) -> None:
    """A block of several rows, ragged, over slots that hold older tokens, the block, or nothing."""
    choose = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    rows, kv_heads = choose.randint(1, 2), choose.randint(1, 2)
    group, dim = choose.choice([1, 2, 4, 7]), choose.choice([16, 32, 32])
    width = choose.choice([1, 15, 16, 40, 70])
    slots = width + choose.choice([0, 3, 30])
    dtype = choose.choice([torch.float32, torch.float16, torch.bfloat16])
    lengths = torch.tensor([choose.randint(1, width) for _ in range(rows)])
    older = choose.randint(0, slots - width)
    start = torch.tensor([older + choose.choice([0, 100]) for _ in range(rows)])

    position = torch.full((rows, kv_heads, slots + 2), EMPTY, dtype=torch.int32)
    for row in range(rows):
        for head in range(kv_heads):
            old = torch.randperm(int(start[row]), generator=rng)[:older]
            new = int(start[row]) + torch.arange(int(lengths[row]))
            tokens = torch.cat([old, new]).int()
            # In order, as in an exact prompt, or in none, as after evictions.
            where = torch.arange(slots) if seed % 2 else torch.randperm(slots, generator=rng)
            position[row, head, where[: len(tokens)]] = tokens
    position = position[:, :, :slots].to(DEVICE)
    factors = torch.tensor([0.0, 0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
    alpha = factors[torch.randint(0, 5, (1, rows, kv_heads), generator=rng)]
    weights = scoring.query_weights(alpha, lengths, 0, width)[0].to(DEVICE)

    # As a model hands them in: heads and width swapped by a view.
    query = torch.randn(rows, width, kv_heads * group, dim, generator=rng)
    query = query.to(dtype).to(DEVICE).transpose(1, 2)
    keys = torch.randn(rows, kv_heads, slots, dim, generator=rng).to(dtype).to(DEVICE)
    at = (start[:, None] + torch.arange(width)).to(DEVICE)
    want = attention.mass(query.double().contiguous(), at, keys.double(), position, weights, 0.4)
    # What is beyond a row's length or in an empty slot is nobody's.
    query[(weights == 0).all(dim=1)[:, None].expand(-1, kv_heads * group, -1)] = torch.nan
    keys[position == EMPTY] = torch.nan
    got = prefill.mass(query, at, keys, position, weights, 0.4)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(16))
def test_the_mass_of_a_block_equals_the_reference(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16, 116))
def test_the_mass_of_any_block_equals_the_reference(seed: int) -> None:
    check(seed)


@pytest.mark.skipif(CUDA, reason="counts the interpreter's products")
def test_queries_too_old_to_count_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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
        got = prefill.mass(query, at, query, position, weights, 0.4)
        want = attention.mass(query, at, query, position, weights, 0.4)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
        # Of four tiles of queries and two of slots: at .3 and 0 only the last queries count, and at
        # 1 all do, but the later slots are out of the earlier queries' sight.
        assert len(products) == count
