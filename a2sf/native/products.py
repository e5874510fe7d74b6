"""Products of few rows and a weight matrix.

Owns a kernel for decode steps, in which reading the weights takes most of the time. torch's own
kernels read them at half of the memory's bandwidth or less, and this one at nearly all of it. Knows
nothing of layers.
"""

# numba infers types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import ctypes
from functools import cache

import numpy as np
import torch
from numba import carray, float32, njit
from torch import Tensor

from a2sf.native import compiling, memory, team
from a2sf.native.memory import SUMS, add, floats_at, halves_at, longs_at, store, widen

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of the weights; the kernel computes in float32."""

_TURN = 1 << 14
"""Weights that a thread multiplies in one turn: they stay in its cache for the next rows."""

_WORTH_A_THREAD = 1 << 16
"""Weights per additional thread: reading them takes about as long as waking a thread."""

_Call = ctypes.c_int64 * 8
"""The arguments of the kernel: the addresses of values [rows, in], weight [out, in], bias [out]
(0: none) and output [rows, out]; then rows, in, out, and the number of turns taken, at first 0.
Values are float32; the others are in the dtype of the weights."""


@cache
def program(dtype: torch.dtype) -> int:
    """Compile the kernel for weights of a dtype, or load it; return its address."""
    return compiling.compiled(_PROGRAMS[dtype], uses=[memory])


def multiply(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply as `torch.nn.functional.linear`, without gradients.

    Args:
        values: [..., in], on the processor, in the dtype of the weight or in float32.
        weight: [out, in], contiguous, in one of DTYPES.
        bias: [out], contiguous, in the same dtype, or None.

    Returns:
        [..., out] in the dtype of the weight.
    """
    # A decode step calls this about two hundred times, so Python's overhead matters.
    dtype = weight.dtype
    if values.dtype != torch.float32:
        values = values.float()
    if not values.is_contiguous():
        values = values.contiguous()
    outputs, width = weight.shape
    shape = (*values.shape[:-1], outputs)
    output = torch.empty(shape, dtype=dtype)
    call = _Call(
        values.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        values.numel() // width,
        width,
        outputs,
    )
    threads = min(torch.get_num_threads(), 1 + outputs * width // _WORTH_A_THREAD)
    team.run(program(dtype), ctypes.addressof(call), threads)
    return output


@njit(fastmath=SUMS)
def _dot(weight, values, width):
    total = float32(0.0)
    for i in range(width):
        total += values[i] * widen(weight[i])
    return total


@njit(fastmath=SUMS)
def _two_dots(weight, values, width):
    t0 = t1 = float32(0.0)
    for i in range(width):
        w = widen(weight[i])
        t0 += values[i] * w
        t1 += values[width + i] * w
    return t0, t1


@njit(fastmath=SUMS)
def _four_dots(weight, values, width):
    t0 = t1 = t2 = t3 = float32(0.0)
    second, third = 2 * width, 3 * width
    for i in range(width):
        w = widen(weight[i])
        t0 += values[i] * w
        t1 += values[width + i] * w
        t2 += values[second + i] * w
        t3 += values[third + i] * w
    return t0, t1, t2, t3


@njit
def _write(output, index, value):
    # Not inlined by numba, which warns if `store` is inlined several times into one function.
    store(output, index, value)


@njit
def _multiply(data, numbers, size):
    """Multiply some outputs at a time until none is left; every thread of the team runs this.

    Each thread reads its weights in the order of memory, so that the processor prefetches them.
    `numbers` turns addresses into pointers; `size` is the size of a weight in bytes.
    """
    call = carray(data, 8, np.int64)
    weights, rows, width, outputs = call[1], call[4], call[5], call[6]
    bias, output = numbers(call[2]), numbers(call[3])
    turn = max(1, _TURN // width)
    taken = longs_at(call.ctypes.data + 8 * 7)
    first = add(taken, 1) * turn
    while first < outputs:
        last = min(first + turn, outputs)
        row = 0
        while row < rows:
            values = floats_at(call[0] + 4 * row * width)
            left = rows - row
            for o in range(first, last):
                weight = numbers(weights + size * o * width)
                shift = widen(bias[o]) if call[2] else float32(0.0)
                at = row * outputs + o
                if left >= 4:
                    t0, t1, t2, t3 = _four_dots(weight, values, width)
                    _write(output, at, t0 + shift)
                    _write(output, at + outputs, t1 + shift)
                    _write(output, at + 2 * outputs, t2 + shift)
                    _write(output, at + 3 * outputs, t3 + shift)
                elif left >= 2:
                    t0, t1 = _two_dots(weight, values, width)
                    _write(output, at, t0 + shift)
                    _write(output, at + outputs, t1 + shift)
                else:
                    _write(output, at, _dot(weight, values, width) + shift)
            row += 4 if left >= 4 else 2 if left >= 2 else 1
        first = add(taken, 1) * turn


def _float32(data):
    """Multiply with weights in float32; `data` is the address of a call."""
    _multiply(data, floats_at, 4)


def _bfloat16(data):
    """Multiply with weights in bfloat16; `data` is the address of a call."""
    _multiply(data, halves_at, 2)


_PROGRAMS = {torch.float32: _float32, torch.bfloat16: _bfloat16}
