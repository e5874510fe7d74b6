"""The random numbers follow their formula and their distribution."""

import hashlib
import math

import pytest
import torch

from a2sf.engine import rng
from tests.sampling_cases import (
    CPU,
)


def noise_written_out(seed: int, draws: int, token: int) -> float:
    """The generator's formula in Python integers."""

    def mix(value: int) -> int:
        value = (value ^ value >> 16) * 0x7FEB352D % 2**32
        value = (value ^ value >> 15) * 0x846CA68B % 2**32
        return value ^ value >> 16

    digest = hashlib.blake2b(
        seed.to_bytes(8, "little") + draws.to_bytes(8, "little"), digest_size=8
    ).digest()
    first, second = (int.from_bytes(part, "little") for part in (digest[:4], digest[4:]))
    low = mix(token ^ first)
    high = mix(low ^ second)
    # The lower 32 bits have an offset of 1/2.
    uniform = (high * 2**32 + (low + 2**31) % 2**32) / 2**64
    return -math.log1p(-min(max(uniform, 2**-64), 1 - 2**-53))


@pytest.mark.parametrize(("seed", "draws"), [(0, 0), (7, 1), (2**63 - 1, 12345)])
def test_random_numbers_equal_the_integer_formula(seed: int, draws: int) -> None:
    got = rng.exponential([(1, 1), (seed, draws)], 3000, CPU)[1].double()
    want = torch.tensor([noise_written_out(seed, draws, token) for token in range(3000)])
    # The largest numbers never win a race, and a float is coarse there.
    torch.testing.assert_close(got[want < 10], want.double()[want < 10], rtol=1e-3, atol=0)


def test_random_numbers_are_exponential_and_differ_by_draw() -> None:
    many = rng.exponential([(5, draws) for draws in range(40)], 50_000, CPU).double()
    quantiles = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    expected = -torch.log1p(-quantiles)
    for row in many[:4]:
        share = (row[:, None] < expected).double().mean(dim=0)
        assert (share - quantiles).abs().max() < 0.01
    assert many.min() > 0
    assert many.min() < 1e-5
    correlation = torch.corrcoef(torch.cat([many[:, :-1], many[:1, 1:]]))
    assert (correlation - torch.eye(41)).abs().max() < 0.03
