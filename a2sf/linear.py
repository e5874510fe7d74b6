"""Linear layers whose weights lie in memory as the processor multiplies them fastest.

Owns one replacement for torch's `Linear`: weights laid out once for oneDNN, one of the libraries
of matrix kernels inside torch. By itself torch takes another for float32, which is several times
slower on some processors. Decoding reads every weight once a step, so this is most of a step there.
Knows nothing of models.
"""

from typing import Self

import torch
from torch import Tensor

PACKED_DTYPES = (torch.float32, torch.bfloat16)
"""float64 is for exact comparisons, and float16 kernels are missing on most processors."""

_ROWS_EXPECTED = 16
"""The input rows that the layout is chosen for; measured good from 1 row to thousands."""

_STEPS = ((16, 1), (64, 16), (512, 64))
"""Up to so many input rows, the numbers of rows that are computed lie so far apart."""

_LARGEST_STEP = 512


class PackedLinear(torch.nn.Module):
    """A frozen `Linear` with a packed weight: the same function, up to rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def of(cls, linear: torch.nn.Linear) -> Self:
        """Pack a layer's weight [out, in]; its own stays as it is."""
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_EXPECTED)
        return cls(packed, None if linear.bias is None else linear.bias.detach())

    def forward(self, values: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        # A decode step comes here some hundred times: every call of Python's shows, so that what
        # needs no padding goes straight on. That makes a step of one row 5 to 8 % shorter.
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
    """Return how many input rows are computed for so many: that many, or a few more.

    oneDNN makes a kernel of half a megabyte for every number of rows that it meets, and keeps a
    thousand of them. Prompts have every length, so without this a server would grow by hundreds of
    megabytes before it stops growing.
    """
    step = next((step for most, step in _STEPS if rows <= most), _LARGEST_STEP)
    return -(-rows // step) * step


def packs(dtype: torch.dtype) -> bool:
    """Whether layers of `dtype` can be packed on this machine's processor.

    oneDNN lays bfloat16 out only for processors with instructions for it (AVX-512 and newer).
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if dtype == torch.bfloat16:
        return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return available and dtype in PACKED_DTYPES


def pack(module: torch.nn.Module) -> None:
    """Replace, in place, every linear layer inside `module` by a packed one.

    Only on processors, and only where `packs` says so; elsewhere `module` stays as it is. A weight
    shared with an embedding stays there too, so it is held twice.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            # Subclasses may do more than multiply.
            if type(child) is not torch.nn.Linear:
                continue
            if child.weight.device.type == "cpu" and packs(child.weight.dtype):
                setattr(parent, name, PackedLinear.of(child))
