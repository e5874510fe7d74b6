"""Describes the machine that figures were measured on. Knows nothing of what was measured."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from a2sf.model import dtypes

LIBRARIES = ("torch", "transformers")


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Processor or GPU, cores, threads, dtype, and the relevant versions."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "dtype": dtypes.name(dtype),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }


def processor() -> str:
    """Name the processor, as the kernel does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
