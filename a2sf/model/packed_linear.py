"""Linear layers with weights packed for fast multiplication on a processor.

Owns one replacement for torch's `Linear`, with weights packed once for oneDNN, one of torch's
matrix libraries. For float32, torch itself uses another library, which is several times slower on
some processors. A decode step reads every weight once, so this dominates the step's time there.
Knows nothing of models.
"""

from typing import Self

import torch
from torch import Tensor

PACKED_DTYPES = (torch.float32, torch.bfloat16)
"""float64 is only for exact comparisons, and most processors have no float16 kernels."""

_ROWS_EXPECTED = 16
"""The number of input rows for which oneDNN chooses the layout; good from 1 row to thousands."""

_STEPS = ((16, 1), (64, 16), (512, 64))
"""(max_rows, multiple): up to max_rows input rows, pad to this multiple."""

_LARGEST_STEP = 512
"""The multiple for more input rows."""


class PackedLinear(torch.nn.Module):
    """A frozen `Linear` with a packed weight. Results are equal up to rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def of(cls, linear: torch.nn.Linear) -> Self:
        """Pack a copy of a layer's weight [out, in]; the layer does not change."""
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_EXPECTED)
        return cls(packed, None if linear.bias is None else linear.bias.detach())

    def forward(self, values: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        # A decode step calls this about a hundred times, so Python's overhead matters: skipping
        # `pad` where it is not needed makes a step of one row 5 to 8 % faster.
        rows = values.numel() // values.shape[-1]
        padding = computed_rows(rows) - rows
        if not padding:
            return self._product(values)
        flat = torch.nn.functional.pad(values.reshape(rows, -1), (0, 0, 0, padding))
        return self._product(flat)[:rows].view(*values.shape[:-1], -1)

    def _product(self, values: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise.default
        product: Tensor = linear(values, self.weight, self.bias, "none", [], "")
        return product


def computed_rows(rows: int) -> int:
    """Return the number of rows to compute for `rows` input rows: `rows`, or a few more.

    oneDNN compiles a kernel of half a megabyte for every number of rows, and caches a thousand of
    them. Prompts have all lengths, so without padding a server would grow by hundreds of megabytes.
    """
    step = next((step for most, step in _STEPS if rows <= most), _LARGEST_STEP)
    return -(-rows // step) * step


def packs(dtype: torch.dtype) -> bool:
    """Whether layers of `dtype` can be packed on this machine's processor.

    oneDNN packs bfloat16 only on processors with instructions for it (AVX-512 and newer).
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if dtype == torch.bfloat16:
        return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return available and dtype in PACKED_DTYPES


def pack(module: torch.nn.Module) -> None:
    """Replace, in place, every linear layer inside `module` by a packed one.

    Only on processors, and only if `packs` is true; otherwise `module` does not change. A weight
    tied to an embedding is then in memory twice.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            # Subclasses may compute something else.
            if type(child) is not torch.nn.Linear:
                continue
            if child.weight.device.type == "cpu" and packs(child.weight.dtype):
                setattr(parent, name, PackedLinear.of(child))
