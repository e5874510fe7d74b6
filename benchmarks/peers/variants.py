"""The variants of the grid: each one's worker, environment, and the bytes that its step moves.

Knows nothing of a peer's code and runs nothing.
"""

from dataclasses import dataclass
from typing import Literal

from .models import ITEM_BYTES, Shape

Environment = Literal["project", "kvpress", "openvino"]

BASE = "dynamic"
"""The variant in the denominator of ratios."""

SCORE_BYTES = 8
"""Bytes of a slot's position and score in our cache."""


@dataclass(frozen=True)
class Variant:
    """One engine under one setting."""

    name: str
    label: str
    environment: Environment
    module: str
    arguments: tuple[str, ...] = ()
    bounded: bool = False
    """Whether a row keeps a budget of tokens; otherwise it keeps all, and is measured once."""
    passes: int = 1
    """How often a step moves the KV: 1 if attention reads it in place; 3 if it is read, written to
    a new place (`torch.cat` or a gather) and read there."""
    slot_bytes: int = 0
    """Bytes read in addition to a token's keys and values, per layer and KV head."""

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that the engine's own programs set before they load torch."""
        return {"OMP_WAIT_POLICY": "PASSIVE"} if self.module == "worker_ours" else {}

    def step_bytes(
        self, shape: Shape, *, dtype: str, context: int, batch: int, budget: int | None
    ) -> int:
        """Bytes that a decode step must move: weights once, and the KV of every row."""
        tokens = context if budget is None else min(budget, context)
        slots = shape.token_slots * self.slot_bytes
        kv = self.passes * shape.token_bytes(dtype) + slots
        return shape.weights_read * ITEM_BYTES[dtype] + batch * tokens * kv


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            "a2sf",
            "ours, a2sf",
            "project",
            "worker_ours",
            ("a2sf",),
            bounded=True,
            slot_bytes=SCORE_BYTES,
        ),
        Variant(
            "window",
            "ours, window",
            "project",
            "worker_ours",
            ("window",),
            bounded=True,
            slot_bytes=SCORE_BYTES,
        ),
        Variant(
            "full",
            "ours, full cache",
            "project",
            "worker_ours",
            ("full",),
            slot_bytes=SCORE_BYTES,
        ),
        Variant(BASE, "transformers generate", "project", "worker_dynamic", passes=3),
        Variant(
            "batching", "transformers continuous batching", "project", "worker_batching", passes=3
        ),
        Variant(
            "kvpress-knorm",
            "kvpress, Knorm",
            "kvpress",
            "worker_kvpress",
            ("knorm",),
            bounded=True,
            passes=3,
        ),
        Variant(
            "kvpress-tova",
            "kvpress, TOVA",
            "kvpress",
            "worker_kvpress",
            ("tova",),
            bounded=True,
            passes=3,
        ),
        Variant(
            "openvino-evict",
            "OpenVINO GenAI, evicting",
            "openvino",
            "worker_openvino",
            bounded=True,
        ),
        Variant("openvino-full", "OpenVINO GenAI, full cache", "openvino", "worker_openvino"),
    )
}


def predicted_ms(step_bytes: int, bytes_per_s: float) -> float:
    """Milliseconds to move these bytes at a measured bandwidth: a lower limit."""
    return step_bytes / bytes_per_s * 1e3


def bandwidth(threads: int, *, megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second that this machine reads: the best of several sums over a large tensor."""
    import torch

    from .loop import timed

    torch.set_num_threads(threads)
    tensor = torch.ones(megabytes * 2**20 // 4)
    tensor.sum()
    return tensor.nbytes / min(timed(tensor.sum) for _ in range(repeats))
