"""What compiled code needs: pointers, formats of numbers, atomic operations, calls of C functions.

Owns how kernels, and the threads that run them, use memory. Knows nothing of what they compute.
"""

# numba infers types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any

from llvmlite import ir
from numba import types, uint16, uint32
from numba.extending import intrinsic, overload

SUMS = {"reassoc", "contract"}
"""Fast-math flags that let LLVM vectorise sums, and stay correct for NaN and infinity."""


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


def _changing(operation: str) -> Any:
    """An atomic operation on an int64 at a pointer; it returns the previous value."""

    @intrinsic
    def change(context, counter, operand):
        def generate(context, builder, signature, arguments):
            return builder.atomic_rmw(operation, *arguments, "seq_cst")

        return types.int64(types.CPointer(types.int64), types.int64), generate

    return change


add = _changing("add")
keep_bits = _changing("and")


@intrinsic
def load(context, counter):
    """Read an int64 that other threads change."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(arguments[0], "seq_cst", 8)

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic
def compare_and_swap(context, counter, expected, new):
    """Set an int64 to `new` if it is `expected`; return whether it was."""

    def generate(context, builder, signature, arguments):
        result = builder.cmpxchg(*arguments, "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.CPointer(types.int64), types.int64, types.int64), generate


@intrinsic
def call(context, function, argument):
    """Call the C function at an address with a pointer, which a function may ignore."""

    def generate(context, builder, signature, arguments):
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer]).as_pointer()
        target, given = arguments
        builder.call(builder.inttoptr(target, kind), [builder.inttoptr(given, pointer)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


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
