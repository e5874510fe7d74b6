"""Linear layers on a processor: few rows are multiplied by a kernel, many by torch.

Owns the choice between them. Knows nothing of models.
"""

from typing import Self

import torch
from torch import Tensor

from a2sf import native
from a2sf.native import products

MOST_ROWS = 64
"""Input rows up to which the kernel is used. With more, torch's float32 products are as fast."""

_BLOCK = 1 << 20
"""Weights that are converted to float32 at a time."""


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
        # The kernel has no gradients, and models are run in inference mode where none are needed.
        if not torch.is_inference_mode_enabled():
            return super().forward(values)
        if values.numel() <= MOST_ROWS * self.in_features:
            # Not `self.weight`, which torch looks up in several dictionaries.
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            assert weight is not None
            return products.multiply(values, weight, bias)
        if values.dtype == torch.bfloat16 and not multiplies_bfloat16():
            return _in_float32(values, self.weight, self.bias)
        return super().forward(values)


def multiplies_bfloat16() -> bool:
    """Whether torch's products of bfloat16 are fast on this processor, by oneDNN's own rule."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def accelerate(module: torch.nn.Module) -> None:
    """Turn every linear layer inside `module` that is on a processor into a `ProcessorLinear`.

    Only in float32 and bfloat16, and only where kernels can run. Compiles the kernel.
    """
    if not native.available():
        return
    for part in module.modules():
        # Subclasses may compute something else.
        if type(part) is not torch.nn.Linear:
            continue
        weight = part.weight
        on_cpu = weight.device.type == "cpu" and weight.is_contiguous()
        if on_cpu and weight.dtype in products.DTYPES:
            products.program(weight.dtype)
            ProcessorLinear.take_over(part)


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
