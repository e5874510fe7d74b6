"""GPUs by name, with their vendor's published figures.

Owns the table. The figures are peaks from data sheets, for dense 16-bit arithmetic: we measured
none of them, and no program reaches them.
"""

from dataclasses import dataclass

from a2sf.errors import InvalidArgument


@dataclass(frozen=True)
class Gpu:
    """One GPU model; None: unknown."""

    memory: int | None
    """Bytes."""
    bandwidth: int | None
    """Bytes per second between memory and processor."""
    compute: int | None
    """Multiplications and additions per second."""


GPUS = {
    "l4": Gpu(24 * 10**9, 300 * 10**9, 121 * 10**12),
    "l40s": Gpu(48 * 10**9, 864 * 10**9, 362 * 10**12),
    "a100-40gb": Gpu(40 * 10**9, 1_555 * 10**9, 312 * 10**12),
    "a100-80gb": Gpu(80 * 10**9, 2_039 * 10**9, 312 * 10**12),
    "h100": Gpu(80 * 10**9, 3_350 * 10**9, 989 * 10**12),
    "h200": Gpu(141 * 10**9, 4_800 * 10**9, 989 * 10**12),
}
"""The a100-80gb, h100 and h200 are the SXM modules."""


def gpu(name: str | None) -> Gpu:
    """Look up a GPU; for None, all its figures are unknown.

    Raises InvalidArgument with the known names.
    """
    if name is None:
        return Gpu(None, None, None)
    if name not in GPUS:
        raise InvalidArgument(
            "--gpu",
            f"{name!r}; accepted: {', '.join(GPUS)}; for others give --gpu-memory, --bandwidth and "
            "--compute",
        )
    return GPUS[name]
