"""Checks that a model and an engine of given sizes can serve a request.

Owns the checks that need the model's shape or the engine's sizes, and their messages. The request's
own types check everything else. Knows nothing of rows or schedules.
"""

from itertools import chain

from a2sf.cache.budgets import resolve
from a2sf.engine.config import EngineConfig
from a2sf.engine.sequence import find_stop_reasons
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.policy import EffectivePolicy
from a2sf.requests import GenerationRequest


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
