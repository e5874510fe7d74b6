"""Describes the machine of a run, and measures its speed of copies and of matrix products.

Both speeds are measured in the same run as everything else, because a roofline from a data sheet
could be too high or too low.
"""

import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.run import Run
from benchmarks.gpu.timing import device_ms, spread
from tuner.evaluation import machine

LIBRARIES = ("triton", "grpcio", "tokenizers", "numpy")
"""Reported in addition to the versions that every figure of this project includes."""

COPIES = 30
PRODUCTS = 20

QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total"
"""Fields queried from `nvidia-smi`."""


def describe(device: torch.device) -> dict[str, Any]:
    """Names, versions and clocks, with a note for values that are unavailable."""
    found: dict[str, Any] = {
        **machine.describe(device, torch.bfloat16),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cuda": torch.version.cuda or "none",
    }
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return found | _clocks()


def _clocks() -> dict[str, str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia_smi": f"no answer: {type(error).__name__}"}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(QUERY.replace(".", "_").split(","), values, strict=False))


def measure(run: Run) -> None:
    """Describe the machine, and measure its copies (bytes read and written) and its products."""
    run.report.document["machine"] |= describe(run.device)
    rates = copy_rates(run)
    run.bytes_per_s = sorted(rates)[len(rates) // 2]
    run.report.add("copy, GB/s read and written", **spread([rate / 1e9 for rate in rates], 1))
    speeds = product_speeds(run)
    size = run.sizes.matmul
    run.report.add("bfloat16 matrix product, TFLOP/s", size=size, **spread(speeds, 1))
    run.report.document["machine"] |= {
        "copy_gb_per_s": round(run.bytes_per_s / 1e9, 1),
        "matmul_tflop_per_s": spread(speeds, 1)["median"],
    }
    run.free()


def copy_rates(run: Run) -> list[float]:
    """Bytes read and written per second by copies within the device, for each copy."""
    source = torch.ones(run.sizes.copied_bytes // 4, device=run.device)
    target = torch.empty_like(source)
    times = device_ms(lambda: target.copy_(source), run.device, COPIES)
    return [(source.nbytes + target.nbytes) / ms * 1e3 for ms in times]


def product_speeds(run: Run) -> list[float]:
    """TFLOP/s of square products in bfloat16, for each product."""
    size = run.sizes.matmul
    left, right = (
        torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2)
    )
    times = device_ms(lambda: left @ right, run.device, PRODUCTS)
    return [2 * size**3 / ms / 1e9 for ms in times]
