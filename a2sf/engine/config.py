"""The engine's configuration: the sizes that fix its memory, and how it computes.

Owns the fields with their defaults and descriptions; the server's options take both from here.
Knows nothing of where values come from. Loads no torch, so that `--help` is fast.
"""

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from a2sf.cache.slot_shares import split_slots
from a2sf.errors import InvalidArgument
from a2sf.policy import DEFAULT_METHOD, CachePolicy, Heads
from a2sf.schema import Count, Frozen, Positive, Weight

DEFAULT_MAX_PREFILL_TOKENS = 8192

Kernels = Literal["auto", "torch", "triton", "numba"]
"""The accepted values of the option `kernels`."""


class EngineConfig(Frozen):
    """Sizes that fix the engine's memory before it starts; most docstrings are an option's help."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    slots: Positive = 1024
    """Slots per head of a row, averaged over heads. This is the largest budget of a request, in
    tokens. If the default table splits slots unequally, a request with an equal budget in every
    head can have at most the slots of the narrowest head."""
    head_share: tuple[tuple[Weight, ...], ...] | None = None
    """One weight per layer and KV head: a row's slots are split among heads in proportion. None:
    equal. The bytes of a row are the same either way; a policy with other shares has less room."""
    max_batch: Positive = 8
    """Requests that decode together."""
    max_prefill_tokens: Positive | None = Field(
        default=None,
        description="Longest prompt block, in tokens; without it, the model's context, but at most "
        f"{DEFAULT_MAX_PREFILL_TOKENS}.",
    )
    step_tokens: Positive = 512
    """Prompt tokens computed between two decode steps."""
    max_waiting: Count = 64
    """Requests that may wait for a row; the server refuses any more."""
    kernels: Kernels = "auto"
    """Implementation of eviction: torch operations, Triton kernels on a GPU, or numba kernels on a
    CPU. auto picks Triton or numba if it supports the device, the dtype and the head size, else
    torch."""
    cuda_graphs: bool = True
    """Run the Triton kernels in CUDA graphs, captured at startup. Not used when several processes
    share the model."""
    default_policy: CachePolicy = DEFAULT_METHOD
    """Values for the fields that a request's cache policy does not set. If it names no budget, a
    request without one gets as many slots as every head of a row has. So a sequence that fits into
    a row is exact."""

    @model_validator(mode="after")
    def _default_fits(self) -> Self:
        budget = self.default_policy.budget
        if budget is not None and budget > self.slots:
            raise ValueError(f"the default budget of {budget} exceeds the {self.slots} slots")
        return self

    def head_slots(self, num_layers: int, num_kv_heads: int) -> Heads:
        """Slots of a row in each layer and KV head, [num_layers][num_kv_heads].

        Raises InvalidArgument if head_share does not fit the numbers of layers and heads.
        """
        if self.head_share is None:
            return ((self.slots,) * num_kv_heads,) * num_layers
        if len(self.head_share) != num_layers:
            raise InvalidArgument(
                "head_share", f"{len(self.head_share)} lists; the model has {num_layers} layers"
            )
        for layer, row in enumerate(self.head_share):
            if len(row) != num_kv_heads:
                raise InvalidArgument(
                    "head_share",
                    f"{len(row)} weights in layer {layer}; the model has {num_kv_heads} KV heads",
                )
        return split_slots(self.slots, self.head_share, self.slots * num_layers * num_kv_heads)

    def staging_slots(self, max_context: int) -> int:
        """Slots of the staging row for a model with this context, in tokens."""
        return self.max_prefill_tokens or min(max_context, DEFAULT_MAX_PREFILL_TOKENS)
