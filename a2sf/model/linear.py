"""Linear layers for few input rows on a processor.

Owns a kernel for decode steps, in which reading the weights takes most of the time. torch's own
kernels read them at half of the memory's bandwidth or less, and this one at most of it. Knows
nothing of models.
"""

import ctypes
from functools import cache
from typing import Self

import numpy as np
import torch
from numba import carray, float32, njit
from torch import Tensor

from a2sf import native
from a2sf.native import compiling, memory, team
from a2sf.native.memory import SUMS, add, floats_at, halves_at, longs_at, store, widen

MOST_ROWS = 64
"""Input rows up to which the kernel is used. With more, torch's products are as fast or faster."""

_TURN = 1 << 14
"""Numbers of weights that a thread takes at a time: they fit into its cache for the next rows."""

_WORTH_A_THREAD = 1 << 16
"""Numbers of weights per additional thread: reading them takes about as long as waking a thread."""

_BLOCK = 1 << 20
"""Numbers of weights that are converted to float32 at a time."""


class ProcessorLinear(torch.nn.Linear):
    """A `Linear` that multiplies few rows with the kernel. Results are equal up to rounding."""

    @classmethod
    def take_over(cls, linear: torch.nn.Linear) -> Self:
        """Turn a layer into one of this class; its weights stay where they are."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        return linear

    def forward(self, values: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        # The kernel has no gradients.
        if not torch.is_inference_mode_enabled():
            return super().forward(values)
        if values.numel() <= MOST_ROWS * self.in_features:
            # Not `self.weight`, which torch looks up in several dictionaries.
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            assert weight is not None
            return _few_rows(values, weight, bias)
        if values.dtype == torch.bfloat16 and not multiplies_bfloat16():
            return _in_float32(values, self.weight, self.bias)
        return super().forward(values)


def multiplies_bfloat16() -> bool:
    """Whether torch's products of bfloat16 are fast on this processor.

    oneDNN has them only for processors with instructions for it (AVX-512 and newer).
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def accelerate(module: torch.nn.Module) -> None:
    """Replace every linear layer inside `module` that is on a processor by a `ProcessorLinear`.

    In place, for float32 and bfloat16, Compiles the kernel.
    """
    if not native.available():
        return
    for part in module.modules():
        # Subclasses may compute something else.
        if type(part) is not torch.nn.Linear:
            continue
        if part.weight.device.type == "cpu" and part.weight.dtype in _PROGRAMS:
            program(part.weight.dtype)
            ProcessorLinear.take_over(part)


@cache
def program(dtype: torch.dtype) -> int:
    """Compile the kernel for weights of a dtype, or load it; return its address."""
    return compiling.compiled(_PROGRAMS[dtype], uses=[memory])


def _few_rows(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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


def _in_float32(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply bfloat16 in float32: faster than torch's kernel for processors without bfloat16."""
    rows = values.float()
    output = torch.empty(*values.shape[:-1], len(weight), dtype=weight.dtype)
    size = max(1, _BLOCK // weight.shape[1])
    for first in range(0, len(weight), size):
        part = slice(first, first + size)
        shift = None if bias is None else bias[part].float()
        output[..., part] = torch.nn.functional.linear(rows, weight[part].float(), shift)
    return output


_Call = ctypes.c_int64 * 8
"""The arguments of the kernel: the addresses of values [rows, in], weight [out, in], bias [out]
(0: none) and output [rows, out]; then rows, in, out, and the counter of turns taken. Values are
float32; the others are in the dtype of the weights."""

# The kernel. numba infers types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"


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

    Each thread reads its weights in the order of memory, which keeps prefetching going.
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
