"""Runs Triton programs in tests: on the device, or without one in the interpreter.

Owns the switch, and memory that reveals unwritten elements. Needs Triton, and pytest for the
interpreter.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

SCORE_TOLERANCE = 2e-4 if CUDA else 2e-5
"""Relative tolerance of scores: tensor cores truncate sums, which shows at a logit of 30."""

ALIGNMENT = 16
"""Sizes must be multiples of this, so that Triton compiles one program for all of them."""


@contextmanager
def interpreting(*modules: ModuleType) -> Iterator[None]:
    """Run the modules' programs in the interpreter, even if Triton was imported to compile."""
    if CUDA:
        yield
        return
    import pytest
    import triton.language as tl
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    # The interpreter stores bfloat16 as bits, and would multiply the bits as integers.
    def widened(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object
    ) -> object:
        a, b = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(InterpreterBuilder, "create_dot", widened)
        for module in (tl, tl.standard, *modules):
            for name, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    patch.setattr(module, name, InterpretedFunction(function.fn))
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the result of `torch.empty` with NaN, to detect unwritten memory."""
    with warnings.catch_warnings():
        # On a device the reference uses cuBLAS, which only warns.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
