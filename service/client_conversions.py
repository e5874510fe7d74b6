"""Messages to values and values to messages: the client's side.

Owns reading answers and writing requests. The mirror of `conversions`, and apart from it so that a
client loads neither engine nor torch. Knows nothing of channels.
"""

from collections.abc import Sequence
from typing import TypedDict

from a2sf.errors import InvalidArgument
from a2sf.policy import CachePolicy
from a2sf.requests import (
    CacheStatistics,
    Delta,
    Finished,
    FinishReason,
    Sampling,
    Timings,
    Usage,
)
from a2sf.schema import AlphaTable, ModelIdentity, parse_table
from service.pb import inference_pb2 as pb
from service.policies import policy_from_message, policy_to_message, preset_name, set_fields
from service.results import Completion, ModelDescription, StreamEvent, StreamStarted, TableListing
from service.status import RemoteError


class GenerationOptions(TypedDict, total=False):
    """What a completion may be told besides its prompt and length; all may be left out."""

    sampling: Sampling
    """How tokens are drawn."""
    stop: Sequence[str]
    """Strings that end the completion and are left out of it."""
    stop_token_ids: Sequence[int]
    """Token ids that end the completion."""
    ignore_eos: bool
    """Write on past the model's end-of-sequence token."""
    cache_policy: CachePolicy
    """What the cache may forget; by default what the server was set to."""
    request_id: str
    """Names the request in the server's logs; by default the server makes one up."""
    token_ids: bool
    """Whether the answer carries token ids beside the text."""


def generation_input(
    prompt: str | Sequence[int], max_new_tokens: int, options: GenerationOptions
) -> pb.GenerationInput:
    """Write a request. Raises InvalidArgument for a number that does not fit its field."""
    sampling = options.get("sampling", Sampling())
    try:
        message = pb.GenerationInput(
            request_id=options.get("request_id", ""),
            max_new_tokens=max_new_tokens,
            # Without defaults: a setting that the contract lacks is refused only if asked for.
            sampling=pb.Sampling(**sampling.model_dump(exclude_none=True, exclude_defaults=True)),
            stop=options.get("stop", ()),
            stop_token_ids=options.get("stop_token_ids", ()),
            ignore_eos=options.get("ignore_eos", False),
            cache_policy=policy_to_message(options.get("cache_policy", CachePolicy())),
            output=pb.OutputOptions(token_ids=options.get("token_ids", False)),
        )
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.token_ids.ids.extend(prompt)
    except ValueError as error:
        raise InvalidArgument("input", str(error)) from error
    return message


def stream_event(message: pb.StreamGenerateResponse, request_id: str) -> StreamEvent | None:
    """Read one event of the stream of `request_id`; None for a kind newer than this client."""
    match message.WhichOneof("event"):
        case "started":
            return _started(message.started)
        case "delta":
            delta = message.delta
            return Delta(request_id=request_id, text=delta.text, token_ids=tuple(delta.token_ids))
        case "finished":
            return _finished(message.finished, request_id)
        case _:
            return None


def completion(message: pb.GenerateResponse) -> Completion:
    """Read a whole completion."""
    started = _started(message.started)
    return Completion(
        started=started,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finished=_finished(message.finished, started.request_id),
    )


def model_description(message: pb.GetModelResponse) -> ModelDescription:
    """Read what a server serves."""
    return ModelDescription(
        model=_identity(message.model),
        max_context=message.max_context,
        vocab_size=message.vocab_size,
        head_dim=message.head_dim,
        dtype=message.dtype,
        device=message.device,
        slots=message.slots,
        max_batch=message.max_batch,
        kv_slab_bytes=message.kv_slab_bytes,
        default_cache_policy=policy_from_message(message.default_cache_policy),
        server_version=message.server_version,
    )


def table_listing(message: pb.ListAlphaTablesResponse) -> TableListing:
    """Read the list of tables."""
    return TableListing(
        served={table.name: table.sha256 for table in message.tables},
        refused={table.name: table.reason for table in message.refused},
    )


def alpha_table(message: pb.GetAlphaTableResponse) -> AlphaTable:
    """Read one table from its canonical JSON. Raises TableError as reading its file would."""
    return parse_table(message.canonical_json.encode())


def _started(message: pb.GenerationStarted) -> StreamStarted:
    policy = message.cache_policy
    kind = policy.WhichOneof("method")
    return StreamStarted(
        request_id=message.request_id,
        prompt_tokens=message.prompt_tokens,
        seed=message.seed,
        method=_method(policy),
        alpha=policy.alpha if kind == "alpha" else None,
        table_name=policy.table.name if kind == "table" else None,
        table_sha256=policy.table.sha256 if kind == "table" else None,
        budget=policy.budget,
        layer_budgets=tuple(policy.layer_budgets),
        recent=policy.recent,
        layer_recents=tuple(policy.layer_recents),
        sinks=policy.sinks,
        prefill_chunk=policy.prefill_chunk,
        random_seed=policy.random_seed if policy.HasField("random_seed") else None,
    )


def _method(policy: pb.EffectiveCachePolicy) -> str:
    match policy.WhichOneof("method"):
        case "preset":
            return preset_name(policy.preset)
        case "table":
            return "table"
        case _:
            return "a2sf"


def _finished(message: pb.GenerationFinished, request_id: str) -> Finished:
    try:
        reason = FinishReason[pb.FinishReason.Name(message.reason).removeprefix("FINISH_REASON_")]
    except (KeyError, ValueError):
        raise RemoteError(f"finished for reason {message.reason}; upgrade this client") from None
    usage, cache, timings = message.usage, message.cache, message.timings
    return Finished(
        request_id=request_id,
        reason=reason,
        matched_stop=message.matched_stop if message.HasField("matched_stop") else None,
        usage=Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens),
        cache=CacheStatistics(
            budget=cache.budget,
            kept_tokens=cache.kept_tokens,
            evicted_tokens=cache.evicted_tokens,
            kv_bytes=cache.kv_bytes,
            kv_bytes_full=cache.kv_bytes_full,
        ),
        timings=Timings(
            queue_s=timings.queue_seconds,
            prefill_s=timings.prefill_seconds,
            decode_s=timings.decode_seconds,
        ),
    )


def _identity(message: pb.ModelIdentity) -> ModelIdentity:
    return ModelIdentity(**{"revision": None, **set_fields(message)})
