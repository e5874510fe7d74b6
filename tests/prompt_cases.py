"""Test cases and checks for the kernels of a prompt's blocks.

Runs on a CUDA device, or without one in Triton's interpreter; flash attention only on CUDA devices.
"""

import random

import torch
from torch import Tensor

from a2sf.cache import attention, scoring
from a2sf.cache.kernels import prefill
from a2sf.cache.scoring import EMPTY
from tests.interpreting import ALIGNMENT, DEVICE, SCORE_TOLERANCE


def check_mass(
    seed: int, kind: tuple[int, int, int, torch.dtype] | None = None, *, known: bool = False
) -> None:
    """Blocks of different lengths in several rows, over slots with older tokens, or empty ones.

    `kind` as in `SERVED`, or chosen by the seed; `known` passes in the normalisers.
    """
    choose = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    rows, kv_heads = choose.randint(1, 2), choose.randint(1, 2)
    group, dim = choose.choice([1, 2, 4, 7]), choose.choice([16, 32, 32])
    width = choose.choice([1, 15, 16, 40, 70])
    slots = width + choose.choice([0, 3, 30])
    dtype = choose.choice([torch.float32, torch.float16, torch.bfloat16])
    beside = 2
    if kind is not None:
        group, kv_heads, dim, dtype = kind
        width *= 4
        slots = -(-(4 * slots) // ALIGNMENT) * ALIGNMENT
        beside = ALIGNMENT
    lengths = torch.tensor([choose.randint(1, width) for _ in range(rows)])
    older = choose.randint(0, slots - width)
    start = torch.tensor([older + choose.choice([0, 100]) for _ in range(rows)])

    position = torch.full((rows, kv_heads, slots + beside), EMPTY, dtype=torch.int32)
    for row in range(rows):
        for head in range(kv_heads):
            old = torch.randperm(int(start[row]), generator=rng)[:older]
            new = int(start[row]) + torch.arange(int(lengths[row]))
            tokens = torch.cat([old, new]).int()
            # In order, as in an exact prompt, or in random order, as after evictions.
            where = torch.arange(slots) if seed % 2 else torch.randperm(slots, generator=rng)
            position[row, head, where[: len(tokens)]] = tokens
    position = position[:, :, :slots].to(DEVICE)
    factors = torch.tensor([0.0, 0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
    alpha = factors[torch.randint(0, 5, (1, rows, kv_heads), generator=rng)]
    weights = scoring.query_weights(alpha, lengths, 0, width)[0].to(DEVICE)

    # In the layout of a model's projections: heads and width swapped by a view.
    query = torch.randn(rows, width, kv_heads * group, dim, generator=rng)
    query = query.to(dtype).to(DEVICE).transpose(1, 2)
    keys = torch.randn(rows, kv_heads, slots, dim, generator=rng).to(dtype).to(DEVICE)
    at = (start[:, None] + torch.arange(width)).to(DEVICE)
    lse = None
    if known:
        exact = query.double(), at, keys.double(), position
        lse = _normalisers(*exact, 0.4).float()
    want = attention.attention_sum(
        query.double().contiguous(), at, keys.double(), position, weights, 0.4
    )
    # Elements beyond a row's length or in an empty slot must not be used.
    query[(weights == 0).all(dim=1)[:, None].expand(-1, kv_heads * group, -1)] = torch.nan
    keys[position == EMPTY] = torch.nan
    got = prefill.attention_sum(query, at, keys, position, weights, 0.4, lse)
    torch.testing.assert_close(got, want, rtol=SCORE_TOLERANCE, atol=1e-6)


def check_flash(dtype: torch.dtype, width: int, slots: int) -> None:
    """The last `width` tokens of `slots` tokens in order, with four query heads per KV head."""
    rng = torch.Generator().manual_seed(7)
    query = torch.randn(1, 8, width, 128, generator=rng).to(DEVICE, dtype)
    keys, values = (torch.randn(1, 2, slots, 128, generator=rng).to(DEVICE, dtype) for _ in "kv")
    at = torch.arange(slots - width, slots, device=DEVICE)[None]
    position = torch.arange(slots, device=DEVICE).int().expand(1, 2, slots).contiguous()
    output, lse = prefill.flash(query, keys, values, 0.1)
    exact = query.double(), keys.double(), values.double()
    want = attention.attend(exact[0], at, exact[1], exact[2], position, 0.1)
    torch.testing.assert_close(output.double(), want, rtol=0, atol=2e-2)
    normalisers = _normalisers(exact[0], at, exact[1], position, 0.1)
    torch.testing.assert_close(lse.double(), normalisers, rtol=1e-3, atol=1e-3)


def _normalisers(query: Tensor, at: Tensor, keys: Tensor, position: Tensor, scale: float) -> Tensor:
    """The logarithms of the softmax's normalisers, [rows, H_q, width], written out."""
    group = query.shape[1] // keys.shape[1]
    logits = query @ keys.repeat_interleave(group, dim=1).transpose(2, 3) * scale
    unseen = position.repeat_interleave(group, dim=1)[:, :, None] > at[:, None, :, None]
    return logits.masked_fill(unseen, -torch.inf).logsumexp(dim=-1)
