"""Converts the messages of responses to results.

The counterpart of `service.rpc.conversions.responses` and `.descriptions`, separate from them so
that a client loads neither engine nor torch. Knows nothing of channels and requests.
"""

from collections.abc import Iterable
from datetime import UTC

from a2sf.policy import Heads
from a2sf.requests import CacheStatistics, Finished, FinishReason, Timings, Usage
from a2sf.schema import AlphaTable, ModelIdentity
from a2sf.tablefile import parse_table
from service.client.results import (
    Activated,
    Completion,
    Delta,
    Load,
    ModelDescription,
    Prompt,
    Reloaded,
    StreamEvent,
    StreamStarted,
    TableListing,
    TableSummary,
    TokenizedPrompt,
    TokenLogprob,
    TokenLogprobs,
)
from service.pb import inference_pb2 as pb
from service.policy_messages import policy_from_message, preset_name, set_fields
from service.status import RemoteError


def stream_event(message: pb.StreamGenerateResponse, request_id: str) -> StreamEvent | None:
    """Convert an event of the stream of `request_id`; None for a kind unknown to this client."""
    match message.WhichOneof("event"):
        case "started":
            return _started(message.started)
        case "delta":
            delta = message.delta
            return Delta(
                request_id=request_id,
                text=delta.text,
                token_ids=tuple(delta.token_ids),
                logprobs=_logprobs(delta.logprobs),
            )
        case "finished":
            return _finished(message.finished, request_id)
        case _:
            return None


def completion(message: pb.GenerateResponse) -> Completion:
    """Convert a whole completion."""
    started = _started(message.started)
    return Completion(
        started=started,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finished=_finished(message.finished, started.request_id),
        logprobs=_logprobs(message.logprobs),
    )


def tokenized_prompt(message: pb.TokenizeResponse) -> TokenizedPrompt:
    """Convert a tokenized prompt."""
    return TokenizedPrompt(text=message.text, token_ids=tuple(message.token_ids))


def model_description(message: pb.GetModelResponse) -> ModelDescription:
    """Convert the description of the model and the server's sizes."""
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
        head_slots=_heads(message.head_slots, message.layer_slots, message.model.num_kv_heads),
        max_prefill_tokens=message.max_prefill_tokens,
        chat=message.chat,
        max_waiting=message.max_waiting,
        max_prompt_bytes=message.max_prompt_bytes,
    )


def table_listing(message: pb.ListAlphaTablesResponse) -> TableListing:
    """Convert the list of tables."""
    return TableListing(
        tables={table.name: _summary(table) for table in message.tables},
        refused=_refused(message.refused),
        default_table=message.default_table or None,
        etag=message.etag,
    )


def alpha_table(message: pb.GetAlphaTableResponse) -> AlphaTable:
    """Parse a table from its canonical JSON. Raises TableError, as for the table's file."""
    return parse_table(message.canonical_json.encode())


def activated(message: pb.ActivateAlphaTableResponse) -> Activated:
    """Convert the new default table."""
    return Activated(default_table=message.default_table or None, etag=message.etag)


def reloaded(message: pb.ReloadAlphaTablesResponse) -> Reloaded:
    """Convert the changes of a reload."""
    return Reloaded(
        added=tuple(message.added),
        changed=tuple(message.changed),
        removed=tuple(message.removed),
        refused=_refused(message.refused),
        etag=message.etag,
    )


def load(message: pb.GetLoadResponse) -> Load:
    """Convert the server's load."""
    return Load(
        running=message.running,
        waiting=message.waiting,
        admitted=message.admitted,
        capacity=message.capacity,
        kv_bytes_used=message.kv_bytes_used,
        kv_bytes_limit=message.kv_bytes_limit,
    )


def _summary(message: pb.AlphaTableSummary) -> TableSummary:
    return TableSummary(
        name=message.name,
        sha256=message.sha256,
        dataset=message.dataset,
        verdict=pb.TableVerdict.Name(message.verdict).removeprefix("TABLE_VERDICT_").lower(),
        created_at=message.created_at.ToDatetime(UTC),
    )


def _refused(messages: Iterable[pb.RefusedAlphaTable]) -> dict[str, str]:
    return {table.name: table.reason for table in messages}


def _logprobs(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            **_logprob(message.token).model_dump(),
            top=tuple(_logprob(other) for other in message.top),
        )
        for message in messages
    )


def _logprob(message: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=message.token_id, logprob=message.logprob, text=message.text)


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
        head_budgets=_heads(policy.head_budgets, policy.layer_budgets),
        min_budget=policy.min_budget if policy.HasField("min_budget") else None,
        recent=policy.recent,
        head_recents=_heads(policy.head_recents, policy.layer_recents),
        sinks=policy.sinks,
        prefill_chunk=policy.prefill_chunk,
        random_seed=policy.random_seed if policy.HasField("random_seed") else None,
        prompt=_prompt(message.prompt) if message.HasField("prompt") else None,
    )


def _heads(heads: Iterable[pb.HeadTokens], layers: Iterable[int], num_kv_heads: int = 1) -> Heads:
    """Convert numbers per layer and KV head.

    Servers that do not yet split slots by head send only `layers`: all heads of a layer have the
    same number. If the number of heads is unknown, one entry stands for all.
    """
    per_head = tuple(tuple(layer.tokens) for layer in heads)
    return per_head or tuple((tokens,) * num_kv_heads for tokens in layers)


def _prompt(message: pb.Prompt) -> Prompt:
    return Prompt(text=message.text, token_ids=tuple(message.token_ids))


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
    by_token = message.HasField("matched_stop_token_id")
    usage, cache, timings = message.usage, message.cache, message.timings
    return Finished(
        request_id=request_id,
        reason=reason,
        matched_stop=message.matched_stop if message.HasField("matched_stop") else None,
        matched_stop_token_id=message.matched_stop_token_id if by_token else None,
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
