"""The dtype in which weights are loaded: the requested one, or the best one for the device.

Owns the rule of dtype "auto", for loading and for planning: which dtypes a processor multiplies in
hardware, and a short measurement of which is faster. Knows nothing of weights.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from a2sf.errors import InvalidArgument
from a2sf.model import linear

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_UNITS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "bf16": "Arm's BF16"}
"""Processor units that multiply bfloat16: torch's name -> usual name. Without one, prompts are
multiplied in float32 and take no less time."""

_FASTER = 1.2
"""The speed-up from which bfloat16 is chosen. Above 1, because bfloat16 rounds more, and because
noise in the measurement must not change the choice from start to start."""

_ROWS = (16, 128)
"""Input rows of the timed products: as in a decode step, and as in a piece of a prompt."""

_LARGEST = 2048
"""Largest side of the timed matrices. Larger ones are handled in the same way."""

_ROUNDS = 5


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype, and the reason for it, for people to read."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """The name of the dtype, such as `bfloat16`."""
        return name(self.dtype)


def name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def check(asked: str) -> None:
    """Raise InvalidArgument unless `asked` is "auto" or the name of a dtype."""
    if asked != "auto" and asked not in DTYPES:
        raise InvalidArgument("dtype", f"{asked!r}; accepted: auto, {', '.join(DTYPES)}")


def choose(asked: str, device_type: str, config: Any, *, processes: int = 1) -> DtypeChoice:
    """Choose the dtype in which a model's weights are loaded.

    On a GPU, "auto" is the dtype in which the weights are stored. On a processor it is bfloat16 if
    the processor multiplies bfloat16 in hardware and a measurement finds it faster, else float32.

    Args:
        asked: "auto" or the name of a dtype.
        device_type: "cuda" or "cpu"; "cpu" means the processor of this machine.
        config: the model's settings, a transformers configuration.
        processes: number of processes that share the model. Several must choose the same dtype
            without communication, so they do not measure.
    """
    if asked != "auto":
        return DtypeChoice(DTYPES[asked], "asked for")
    if device_type != "cpu":
        if config.dtype is None:
            return DtypeChoice(torch.bfloat16, "the model does not say how it is stored")
        return DtypeChoice(config.dtype, "as stored")
    if processes > 1:
        return DtypeChoice(torch.float32, "several processes share the model")
    unit, without = bfloat16_unit()
    if unit is None:
        return DtypeChoice(torch.float32, without)
    slower = min(bfloat16_speedups(config).values())
    chosen = torch.bfloat16 if slower >= _FASTER else torch.float32
    return DtypeChoice(chosen, f"with {unit}, bfloat16 is at least {slower:.2f} times as fast here")


def bfloat16_unit() -> tuple[str | None, str]:
    """Return the unit that multiplies bfloat16 in this processor, or None and the reason."""
    # The oldest supported torch does not have this function.
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return None, f"torch {torch.__version__} does not say whether the processor has bfloat16"
    found = capabilities()
    for unit, called in _UNITS.items():
        if found.get(unit):
            if linear.multiplies_bfloat16():
                return called, ""
            return None, f"torch makes no use of the processor's {called}"
    return None, "the processor does not multiply bfloat16 in hardware"


def bfloat16_speedups(config: Any) -> dict[int, float]:
    """Measure the speed-up of bfloat16 over float32 on this processor, by number of input rows.

    Takes tens of milliseconds: medians of alternating products, with the sizes of the model's
    layers up to a limit.
    """
    wide = min(config.hidden_size, _LARGEST)
    long = min(getattr(config, "intermediate_size", None) or 4 * wide, _LARGEST)
    layers = {
        dtype: torch.nn.Linear(wide, long, bias=False, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    for layer in layers.values():
        linear.accelerate(layer)
    ratios = {}
    with torch.inference_mode():
        for rows in _ROWS:
            seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in layers}
            values = torch.ones(rows, wide)
            given = {dtype: values.to(dtype) for dtype in layers}
            for turn in range(_ROUNDS + 1):
                for dtype, layer in layers.items():
                    taken = _seconds(layer, given[dtype])
                    if turn:  # the first round warms up
                        seconds[dtype].append(taken)
            slow, fast = (statistics.median(seconds[dtype]) for dtype in layers)
            ratios[rows] = slow / fast
    return ratios


def _seconds(layer: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> float:
    start = time.perf_counter()
    layer(values)
    return time.perf_counter() - start
