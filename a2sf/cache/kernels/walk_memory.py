"""The memory of the numba kernels: the records of a call, pointers, and the formats of numbers.

Owns the layout of `HEAD` and `CALL`, which `walk` fills and `walk_programs` reads, and how compiled
code loads, stores and counts. Knows nothing of the law.
"""

# numba infers types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types, uint16, uint32
from numba.extending import intrinsic, overload

HEAD = np.dtype(
    [
        ("vectors", np.int64),  # offset of the head's first slot in keys and values, in numbers
        ("marks", np.int64),  # index of the head's first slot in positions and scores
        ("budget", np.int64),  # slots
        ("recent", np.int64),  # tokens
        ("sinks", np.int64),  # tokens
        ("random_seed", np.int64),  # -1 if scores accumulate attention
        ("number", np.int64),  # the model-wide head number
        ("start", np.int64),  # the position of the first token
        ("first", np.int64),  # the index of the first token in queries, keys and values
        ("tokens", np.int64),  # number of tokens
        ("alpha", np.float32),
        ("scored", np.int32),  # whether the scores depend on attention
    ]
)
"""One row and KV head of a layer."""

CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            # Addresses of the tokens' projections and output.
            "query",
            "keys",
            "values",
            "output",
            # Their strides, in elements.
            "query_row",
            "query_head",
            "query_token",
            "keys_row",
            "keys_head",
            "keys_token",
            "values_row",
            "values_head",
            "values_token",
            "output_row",
            "output_head",
            "output_token",
            # Addresses of the layer's slots.
            "stored_keys",
            "stored_values",
            "score",
            "position",
            # Addresses: [pairs] HEAD; [pairs] int64, the heads in the order of work; one int64
            # each, the counters of started heads and of started workers.
            "heads",
            "order",
            "begun",
            "working",
            # Address of bytes [pairs, retained_side, retained_side], 1 for tokens that a query
            # could attend to; address 0 for no record.
            "retained",
            "retained_side",
            # Address of float32 scratch memory, and its size per worker in numbers.
            "scratch",
            "scratch_size",
            "room",  # slots that fit into a worker's scratch
            "pairs",
            "kv_heads",
            "group",
            "dim",
        )
    ]
    + [("scale", np.float64)]
)
"""The arguments of a launch."""

BROUGHT = 16
"""Number of first fields of a CALL that change with every call."""

SIGNATURE = types.void(types.voidptr)


def _bits(source: Any, target: Any, llvm: Any) -> Any:
    @intrinsic
    def cast(context, value):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], llvm)

        return target(source), generate

    return cast


bits_to_float = _bits(types.uint32, types.float32, ir.FloatType())
float_to_bits = _bits(types.float32, types.int32, ir.IntType(32))


def _pointer(element: Any) -> Any:
    # Not arrays: numba checks every array index for negative values, and this prevents LLVM from
    # vectorising loops.
    @intrinsic
    def at(context, address):
        pointer = element if element == types.voidptr else types.CPointer(element)

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return at


floats_at = _pointer(types.float32)
halves_at = _pointer(types.uint16)
integers_at = _pointer(types.int32)
longs_at = _pointer(types.int64)
bytes_at = _pointer(types.uint8)
memory_at = _pointer(types.voidptr)


@intrinsic
def increment(context, counter):
    """Increment a counter atomically; return its previous value."""

    def generate(context, builder, signature, arguments):
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", arguments[0], one, "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


def widen(number):
    """A stored number as float32; bfloat16 is stored as its bits."""


@overload(widen, inline="always")
def _widen_of(number):
    if number == types.float32:
        return lambda number: number
    return lambda number: bits_to_float(uint32(number) << uint32(16))


def store(numbers, index, value):
    """Store a float32; bfloat16 is rounded to nearest, ties to even."""


@overload(store, inline="always")
def _store_of(numbers, index, value):
    if numbers.dtype == types.float32:

        def put(numbers, index, value):
            numbers[index] = value

    else:

        def put(numbers, index, value):
            bits = uint32(float_to_bits(value))
            rounded = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
            # Rounding could turn a NaN into infinity.
            numbers[index] = uint16(rounded) if value == value else uint16(0x7FC0)

    return put
