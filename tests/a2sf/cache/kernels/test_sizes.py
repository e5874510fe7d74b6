"""The fused decode step's tile sizes and splits."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")

from a2sf.cache import kernels
from a2sf.cache.kernels import decode


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_a_tile_fits_its_bytes_and_a_tensor_core(dtype: torch.dtype, dim: int) -> None:
    slots = decode.tile_slots(dim, dtype)
    assert slots in (16, 32, 64, 128)
    padded = 1 << (dim - 1).bit_length()
    assert slots * 2 * padded * dtype.itemsize <= decode.TILE_BYTES
    assert slots == 128 or 2 * slots * 2 * padded * dtype.itemsize > decode.TILE_BYTES


@pytest.mark.parametrize(
    ("programs", "tiles", "splits"),
    [
        (8, 16, 16),  # one row of an 8B model: one tile per split
        (8, 100, 25),  # at most 32 splits; with 4 tiles each, 25 are enough
        (64, 16, 4),  # 5 splits would be used; with 4 tiles each, 4 are enough
        (512, 16, 1),
        (8, 1, 1),
    ],
)
def test_slots_are_split_only_until_the_device_is_busy(
    programs: int, tiles: int, splits: int
) -> None:
    assert decode.choose_splits(programs, tiles, multiprocessors=132) == splits
