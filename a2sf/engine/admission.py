"""Checks that a model and an engine of given sizes can serve a request.

Owns the checks that need the model's shape or the engine's sizes, and their messages. The request's
own types check everything else. Knows nothing of rows or schedules.
"""

from itertools import chain
from typing import Self

from pydantic import model_validator

from a2sf.cache.budgets import resolve, split_slots
from a2sf.engine.decoding import Kernels
from a2sf.engine.sequence import find_stop_reasons
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.policy import DEFAULT_METHOD, CachePolicy, EffectivePolicy, Heads
from a2sf.requests import GenerationRequest
from a2sf.schema import Count, Frozen, Positive, Weight

DEFAULT_MAX_PREFILL_TOKENS = 8192


class EngineConfig(Frozen):
    """Sizes that fix the engine's memory before it starts."""

    slots: Positive = 1024
    """Slots per head in a row, averaged over heads. This is the largest budget of a request."""
    head_share: tuple[tuple[Weight, ...], ...] | None = None
    """One weight per layer and KV head: a row's slots are split among heads in proportion. None:
    equal. The bytes of a row are the same either way; a policy with other shares has less room."""
    max_batch: Positive = 8
    """Number of rows: the most requests that decode together."""
    max_prefill_tokens: Positive | None = None
    """Staging slots for the prompt in prefill. None: the model's context, at most 8192."""
    step_tokens: Positive = 512
    """Prompt tokens computed per step, between two tokens of the running streams."""
    max_waiting: Count = 64
    """The most requests that wait while all rows are in use; the next one is refused."""
    kernels: Kernels = "auto"
    """The implementation of the law: torch on any device, triton on CUDA devices, numba on
    processors. auto: triton or numba where it supports the device, the dtype and the head size,
    else torch."""
    cuda_graphs: bool = True
    """Whether the Triton kernels run in CUDA graphs, captured at the start. Never used when several
    processes share the model."""
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


def check(request: GenerationRequest, model: LoadedModel, config: EngineConfig) -> EffectivePolicy:
    """Check a request and resolve its policy to plain numbers.

    Raises InvalidArgument, naming the field and the accepted values, if the request cannot be
    served, and TableMismatch if its table was made for another model.
    """
    _check_lengths(request, model.shape.max_context)
    _check_token_ids("prompt", request.prompt_ids, model.shape.vocab_size)
    _check_token_ids("stop_token_ids", request.stop_token_ids, model.shape.vocab_size)
    num_stop_tokens = len(find_stop_reasons(request, model))
    if request.min_new_tokens and num_stop_tokens >= model.shape.vocab_size:
        raise InvalidArgument(
            "min_new_tokens",
            f"{request.min_new_tokens}, but all {num_stop_tokens} tokens of the model end the "
            "completion; accepted here: 0",
        )
    if request.table is not None:
        request.table.check_model(model.identity)
    prompt, server = len(request.prompt_ids), config.default_policy
    slots = config.head_slots(model.shape.num_layers, model.identity.num_kv_heads)
    if server.budget is None and server.budget_ratio is None:
        server = server.model_copy(update={"budget": min(chain(*slots))})
    policy = resolve(
        request.cache_policy,
        table=request.table,
        server=server,
        length=prompt + request.max_new_tokens,
        slots=slots,
        num_layers=model.shape.num_layers,
        num_kv_heads=model.identity.num_kv_heads,
    )
    if model.local_heads is not None:
        policy = policy.model_copy(update={"local_heads": model.local_heads})
    needed = policy.staging_slots(prompt)
    available = config.staging_slots(model.shape.max_context)
    if needed > available:
        raise InvalidArgument(
            "prompt",
            f"{prompt} tokens need {needed} staging slots at prefill_chunk "
            f"{policy.prefill_chunk}, and this server has {available}; set a smaller "
            "cache_policy.prefill_chunk (0 means the whole prompt) or a shorter prompt",
        )
    return policy


def _check_lengths(request: GenerationRequest, max_context: int) -> None:
    prompt = len(request.prompt_ids)
    if prompt >= max_context:
        raise InvalidArgument(
            "prompt",
            f"{prompt} tokens; accepted: at most {max_context - 1}, because the first new token "
            f"must fit into the model's context of {max_context}",
        )
    length = prompt + request.max_new_tokens
    if length > max_context:
        raise InvalidArgument(
            "max_new_tokens",
            f"{request.max_new_tokens} after a prompt of {prompt} tokens make {length}; the "
            f"model's context is {max_context}; accepted here: at most {max_context - prompt}",
        )


def _check_token_ids(field: str, ids: tuple[int, ...], vocab_size: int) -> None:
    unknown = next((i for i in ids if i >= vocab_size), None)
    if unknown is not None:
        raise InvalidArgument(field, f"token id {unknown}; accepted: 0 to {vocab_size - 1}")
