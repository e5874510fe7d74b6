"""Which dtype weights are loaded in: the one that was asked for, or what suits the device.

Owns the one rule of dtype "auto", for everything that loads a model or plans for one: what a
processor can multiply, and a short measurement of what it multiplies faster. Knows nothing of
weights.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from a2sf import linear
from a2sf.errors import InvalidArgument

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_UNITS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "bf16": "Arm's BF16"}
"""What multiplies bfloat16 in hardware: as torch names it, and as people do. Without it, oneDNN
converts to float32 first, which costs more than the smaller weights save."""

_FASTER = 1.2
"""So many times as fast bfloat16 must be: its rounding costs something, and noise must not decide
differently at every start."""

_ROWS = (16, 128)
"""Input rows of the products that are timed: a decode step's, and a piece of a prompt's."""

_LARGEST = 2048
"""Sides of the matrices that are timed, at most: larger ones take the same ways through oneDNN."""

_ROUNDS = 5


@dataclass(frozen=True)
class Chosen:
    """A dtype, and why it was taken, for people to read."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """The dtype as people write it, such as `bfloat16`."""
        return name(self.dtype)


def name(dtype: torch.dtype) -> str:
    """Return a dtype as people write it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def check(asked: str) -> None:
    """Raise InvalidArgument for what is neither "auto" nor a dtype's name."""
    if asked != "auto" and asked not in DTYPES:
        raise InvalidArgument("dtype", f"{asked!r}; accepted: auto, {', '.join(DTYPES)}")


def choose(asked: str, device_type: str, config: Any, *, processes: int = 1) -> Chosen:
    """Choose the dtype that a model's weights are loaded in.

    "auto" is, on a GPU, the dtype in which the weights are stored. On a processor it is bfloat16
    where this processor multiplies it in hardware and a measurement finds it faster; else float32.

    Args:
        asked: "auto" or the name of a dtype.
        device_type: "cuda" or "cpu", which then is the processor of this machine.
        config: the model's settings, a transformers configuration.
        processes: how many share the model; several must agree without asking each other.
    """
    if asked != "auto":
        return Chosen(DTYPES[asked], "asked for")
    if device_type != "cpu":
        if config.dtype is None:
            return Chosen(torch.bfloat16, "the model does not say how it is stored")
        return Chosen(config.dtype, "as stored")
    if processes > 1:
        return Chosen(torch.float32, "several processes share the model")
    unit, without = bfloat16_unit()
    if unit is None:
        return Chosen(torch.float32, without)
    slower = min(times_as_fast(config).values())
    chosen = torch.bfloat16 if slower >= _FASTER else torch.float32
    return Chosen(chosen, f"with {unit}, bfloat16 is at least {slower:.2f} times as fast here")


def bfloat16_unit() -> tuple[str | None, str]:
    """Name what multiplies bfloat16 in this processor, or None; and if None, say why."""
    # Added in a version later than the oldest that is supported.
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return None, f"torch {torch.__version__} does not say whether the processor has bfloat16"
    found = capabilities()
    for unit, called in _UNITS.items():
        if found.get(unit):
            if linear.packs(torch.bfloat16):
                return called, ""
            return None, f"torch makes no use of the processor's {called}"
    return None, "the processor does not multiply bfloat16 in hardware"


def times_as_fast(config: Any) -> dict[int, float]:
    """Measure how many times as fast as float32 this processor multiplies bfloat16, by input rows.

    Takes some tens of milliseconds: medians of alternating products of the model's own layers, cut
    to a size.
    """
    wide = min(config.hidden_size, _LARGEST)
    long = min(getattr(config, "intermediate_size", None) or 4 * wide, _LARGEST)
    layers = {
        dtype: linear.PackedLinear.of(torch.nn.Linear(wide, long, bias=False, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
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
