"""Random numbers for sampling, as a function of the request's seed and its number of draws.

Owns a hash-based generator that has no state and gives the same numbers on every device and in
every batch. Knows nothing of logits.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor


def exponential(streams: Sequence[tuple[int, int]], count: int, device: torch.device) -> Tensor:
    """Return exponentially distributed numbers with mean 1, above 0: [rows, count] float32.

    Args:
        streams: for each row, its seed from 0 to 2^63 - 1 and the number of its earlier draws.
        count: numbers per row.
        device: the device that computes them.
    """
    keys = torch.tensor([_keys(*stream) for stream in streams], dtype=torch.int32).to(device)
    high = torch.arange(count, dtype=torch.int32, device=device) ^ keys[:, :1]
    _mix(high)
    low = high.to(torch.float32).mul_(2.0**-32).add_(0.5)
    _mix(high.bitwise_xor_(keys[:, 1:]))
    # A float has 24 bits. Small numbers win races, so add the low word for their lower bits.
    uniform = high.to(torch.float32).add_(low)
    uniform.add_(torch.where(uniform < 0, 2.0**32, 0.0)).mul_(2.0**-32).clamp_(min=2.0**-64)
    return uniform.neg_().log1p_().neg_()


def _keys(seed: int, draws: int) -> tuple[int, int]:
    digest = hashlib.blake2b(struct.pack("<qq", seed, draws), digest_size=8).digest()
    first, second = struct.unpack("<ii", digest)
    return first, second


def _mix(value: Tensor) -> None:
    """Mix the 32 bits of int32 `value` in place; a bijection.

    The same xor-shifts and odd multipliers as in `scoring`, but in 32-bit words: this halves the
    memory traffic, and processors have vector instructions for it.
    """
    shifted = torch.empty_like(value)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        torch.bitwise_right_shift(value, shift, out=shifted)
        # The shift is arithmetic: mask the copies of the sign bit.
        value.bitwise_xor_(shifted.bitwise_and_(2 ** (32 - shift) - 1)).mul_(factor)
