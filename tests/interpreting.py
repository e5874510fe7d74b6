"""Running Triton's programs in tests: on the device, or in the interpreter where there is none.

Owns the switch, and memory that shows what was never written. Needs Triton; pytest only for
interpreting.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

SCORE_TOLERANCE = 2e-4 if CUDA else 2e-5
"""Relative, of scores: tensor cores cut off what they add up, and a logit of 30 feels it."""

ALIGNMENT = 16
"""What sizes must be multiples of for Triton to compile one program for all of them."""


@contextmanager
def interpreting(*modules: ModuleType) -> Iterator[None]:
    """Run the modules' programs on the processor, although others imported Triton to compile."""
    if CUDA:
        yield
        return
    import pytest
    import triton.language as tl
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    # The interpreter holds bfloat16 as bits, and would multiply them as integers.
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
    """Let what `torch.empty` gives be NaN, so that whatever is not written shows."""
    with warnings.catch_warnings():
        # The reference's products on a device go through cuBLAS, which only warns.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
