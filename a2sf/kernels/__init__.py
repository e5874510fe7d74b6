"""The law in Triton, for devices that it compiles for, and in numba, for processors.

Owns what each of them serves. The modules that import Triton or numba are imported by who is
about to run them.
"""

import importlib.util
import os

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of the model; scores and softmax are float32 in all of them."""

PROCESSOR_DTYPES = (torch.bfloat16, torch.float32)
"""Of the model, in numba's programs; they compute in float32."""

LARGEST_HEAD_DIM = 256

LEAST_CAPABILITY = (8, 0)
"""Of a CUDA device: Ampere, the first that multiplies matrices of bfloat16."""


def problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why there are no Triton kernels for a model, with what is accepted; None: there are."""
    if dtype not in DTYPES:
        return f"the model is in {_name(dtype)}; accepted: {_names(DTYPES)}"
    if head_dim > LARGEST_HEAD_DIM:
        return f"its heads are of {head_dim}; accepted: up to {LARGEST_HEAD_DIM}"
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
    """Say why there are no numba programs for a model, with what is accepted; None: there are."""
    if device.type != "cpu":
        return f"the device is {device.type}; accepted: cpu"
    if dtype not in PROCESSOR_DTYPES:
        return f"the model is in {_name(dtype)}; accepted: {_names(PROCESSOR_DTYPES)}"
    from a2sf.kernels import compiling

    if not compiling.available():
        return "torch is built without an OpenMP that has GNU's entry points"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(_name, dtypes))
