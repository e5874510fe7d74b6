"""The law in Triton, for GPUs, and in numba, for processors.

Owns the conditions under which each can be used. Modules that need Triton or numba are imported
only where they are used.
"""

import importlib.util
import os
import sys

import torch

from a2sf import native

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Model dtypes of the Triton kernels; scores and softmax are always float32."""

PROCESSOR_DTYPES = (torch.bfloat16, torch.float32)
"""Model dtypes of the numba kernels; they compute in float32."""

LARGEST_HEAD_DIM = 256

LEAST_CAPABILITY = (8, 0)
"""Lowest CUDA compute capability: Ampere, the first with bfloat16 matrix products."""


def problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why the Triton kernels cannot run a model, and what is accepted; None: they can."""
    if dtype not in DTYPES:
        return f"the model is in {_name(dtype)}; accepted: {_names(DTYPES)}"
    if head_dim > LARGEST_HEAD_DIM:
        return f"the model's head_dim is {head_dim}; accepted: up to {LARGEST_HEAD_DIM}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'a2sf-serve[gpu]'"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            has, least = (".".join(map(str, one)) for one in (capability, LEAST_CAPABILITY))
            return f"the device has compute capability {has}; accepted: {least} and above"
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "the device is a processor; accepted: cuda (or, to try them, TRITON_INTERPRET=1)"


def processor_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the numba kernels cannot run a model, and what is accepted; None: they can."""
    if device.type != "cpu":
        return f"the device is {device.type}; accepted: cpu"
    if dtype not in PROCESSOR_DTYPES:
        return f"the model is in {_name(dtype)}; accepted: {_names(PROCESSOR_DTYPES)}"
    if not native.available():
        return f"the system is {sys.platform}; accepted: linux"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(_name, dtypes))
