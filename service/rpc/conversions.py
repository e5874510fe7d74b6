"""Converts messages to core values and core values to messages, for the server.

Owns the mapping of names. A field with the same meaning has the same name in the proto, the core
and the alpha table, so most of this is a copy. Raises InvalidRequest with dotted proto names. Knows
nothing of channels, handlers or threads.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from a2sf.cache.budgets import resolve
from a2sf.errors import InvalidArgument, InvalidRequest, TableError
from a2sf.model.loader import LoadedModel
from a2sf.policy import PRESETS, CachePolicy, EffectivePolicy, Heads
from a2sf.requests import (
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    ChatMessage,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Sampling,
    Started,
)
from a2sf.schema import AlphaTable, ModelIdentity
from a2sf.tablefile import canonical_json
from a2sf.text import chat_template
from a2sf.text.detokenizer import vocabulary
from a2sf.validation import problems
from service.backend.tables import TableStore
from service.pb import inference_pb2 as pb
from service.policy_messages import preset_value, set_fields
from service.status import Violations, fields_of

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@contextmanager
def proto_fields() -> Iterator[None]:
    """Rename fields in errors raised within the block, from core names to proto names."""
    try:
        yield
    except ValidationError as error:
        raise InvalidRequest((_proto_field(f), told) for f, told in problems(error)) from None
    except InvalidRequest:
        raise
    except InvalidArgument as error:
        raise InvalidRequest([(_proto_field(error.field), error.problem)]) from error


def _proto_field(field: str) -> str:
    head = re.split(r"[.\[]", field)[0]
    if head == "prompt_ids":
        rest = field.removeprefix(head)
        return f"input.token_ids.ids{rest}" if rest else "input.prompt"
    if head in Sampling.model_fields:
        return f"input.sampling.{field}"
    if head in pb.OutputOptions.DESCRIPTOR.fields_by_name:
        return f"input.output.{field}"
    if head == "time_limit_s":
        return "input.time_limit_seconds"
    return f"input.{field}"


def request_id(message: pb.GenerationInput, made_up: str) -> str:
    """Return the request's id, or `made_up` if it has none. Raises InvalidRequest if invalid."""
    if not message.request_id:
        return made_up
    if not _REQUEST_ID.fullmatch(message.request_id):
        raise InvalidRequest(
            [("input.request_id", "accepted: 1 to 128 characters of A-Z a-z 0-9 . _ : -")]
        )
    return message.request_id


@dataclass(frozen=True)
class Prompt:
    """A prompt that was read from a request."""

    text: str | None
    """As given, or as the chat template rendered it; None if token ids were given."""
    token_ids: tuple[int, ...]
    turn_end_ids: tuple[int, ...] = ()
    """Tokens that end the assistant's turn in a conversation."""

    def decoded(self, model: LoadedModel) -> str:
        """Return the text; token ids are decoded, which may be slow: not for the event loop."""
        if self.text is not None:
            return self.text
        backend = vocabulary(model.tokenizer).tokenizer
        return backend.decode(self.token_ids, skip_special_tokens=False)


def read_prompt(
    message: pb.GenerationInput | pb.TokenizeRequest,
    model: LoadedModel,
    max_bytes: int,
    where: str = "input.",
) -> Prompt:
    """Return the encoded prompt. May be slow for a long one: not for the event loop.

    `where` is the prefix of field names in errors. Raises InvalidRequest if the prompt is missing
    or longer than `max_bytes` of UTF-8, and the errors of rendering a chat.
    """
    match message.WhichOneof("prompt"):
        case "text":
            if not message.text:
                raise InvalidRequest([(f"{where}text", "empty; give at least one character")])
            _check_size([message.text], max_bytes, f"{where}text")
            return Prompt(message.text, model.encode(message.text))
        case "chat":
            field = f"{where}chat.messages"
            if not message.chat.messages:
                raise InvalidRequest([(field, "empty; give at least one message")])
            texts = (text for m in message.chat.messages for text in (m.role, m.content))
            _check_size(texts, max_bytes, field)
            return _conversation(message.chat, model, max_bytes, field)
        case "token_ids" if isinstance(message, pb.GenerationInput):
            if not message.token_ids.ids:
                raise InvalidRequest(
                    [(f"{where}token_ids.ids", "empty; give at least one token id")]
                )
            return Prompt(None, tuple(message.token_ids.ids))
    kinds = ", ".join(f.name for f in message.DESCRIPTOR.oneofs_by_name["prompt"].fields)
    raise InvalidRequest([(f"{where}prompt", f"missing; give one of {kinds}")])


def _check_size(texts: Iterable[str], max_bytes: int, field: str) -> None:
    size = sum(len(text.encode()) for text in texts)
    if size > max_bytes:
        raise InvalidRequest([(field, f"{size} bytes; accepted: at most {max_bytes}")])


def _conversation(
    conversation: pb.ChatMessages, model: LoadedModel, max_bytes: int, field: str
) -> Prompt:
    messages = []
    for index, message in enumerate(conversation.messages):
        with fields_of(f"{field}[{index}]"):
            messages.append(ChatMessage(role=message.role, content=message.content))
    try:
        read = chat_template.read(
            model.tokenizer,
            messages,
            max_bytes=max_bytes,
            special_in_content=conversation.special_tokens_in_content,
        )
    except InvalidArgument as error:
        raise InvalidRequest([(field, error.problem)]) from None
    return Prompt(read.text, read.token_ids, chat_template.turn_end_ids(model.tokenizer))


def generation_request(
    message: pb.GenerationInput,
    *,
    name: str,
    prompt_ids: tuple[int, ...],
    turn_end_ids: tuple[int, ...] = (),
    policy: CachePolicy,
) -> GenerationRequest:
    """Make a request of its message and the parts already read; the caller adds the table.

    A million token ids take a while: not for the event loop. Raises InvalidRequest with everything
    that is invalid.
    """
    found = Violations()
    sampling = Sampling()
    lists: dict[str, Any] = {}
    for field, most in (("stop", MAX_STOP_STRINGS), ("stop_token_ids", MAX_STOP_TOKEN_IDS)):
        # Checked here, because pydantic would first validate every entry of a million.
        values = getattr(message, field)
        with found.of_part():
            if len(values) > most:
                raise InvalidArgument(
                    f"input.{field}", f"{len(values)} of them; accepted: at most {most}"
                )
            lists[field] = tuple(values)
    with found.of_part(), fields_of("input.sampling"):
        sampling = Sampling(**set_fields(message.sampling))
    with found.of_part(), proto_fields():
        request = GenerationRequest(
            request_id=name,
            prompt_ids=prompt_ids,
            turn_end_ids=turn_end_ids,
            max_new_tokens=message.max_new_tokens,
            min_new_tokens=message.min_new_tokens,
            time_limit_s=(
                message.time_limit_seconds if message.HasField("time_limit_seconds") else None
            ),
            sampling=sampling,
            ignore_eos=message.ignore_eos,
            logprobs=message.output.logprobs,
            top_logprobs=message.output.top_logprobs,
            cache_policy=policy,
            **lists,
        )
    found.check()
    return request


class Answer:
    """Converts the events of one completion to messages, with the fields that `output` selects."""

    def __init__(self, output: pb.OutputOptions, prompt: Prompt, model: LoadedModel) -> None:
        """Build the echo, if requested; decoding may be slow: not for the event loop."""
        self._output = output
        self._vocabulary = vocabulary(model.tokenizer)
        self._echo: pb.Prompt | None = None
        if output.echo:
            self._echo = pb.Prompt(text=prompt.decoded(model), token_ids=prompt.token_ids)

    def stream_response(self, event: Event) -> pb.StreamGenerateResponse:
        """Convert one event of a stream."""
        match event:
            case Started():
                return pb.StreamGenerateResponse(started=self.started(event))
            case Delta():
                return pb.StreamGenerateResponse(delta=self.delta(event))
            case Finished():
                return pb.StreamGenerateResponse(finished=finished_message(event))

    def started(self, event: Started) -> pb.GenerationStarted:
        """Convert the first event."""
        return pb.GenerationStarted(
            request_id=event.request_id,
            cache_policy=_effective_message(event.policy),
            prompt_tokens=event.prompt_tokens,
            seed=event.seed,
            prompt=self._echo,
        )

    def delta(self, event: Delta) -> pb.GenerationDelta:
        """Convert new tokens and text."""
        return pb.GenerationDelta(
            text=event.text,
            token_ids=event.token_ids if self._output.token_ids else (),
            logprobs=[
                pb.TokenLogprobs(
                    token=self._logprob(token_id, one.logprob),
                    top=[self._logprob(other.token_id, other.logprob) for other in one.top],
                )
                for token_id, one in zip(event.token_ids, event.logprobs, strict=False)
            ],
        )

    def _logprob(self, token_id: int, logprob: float) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            token_id=token_id, logprob=logprob, text=self._vocabulary.token_text(token_id)
        )


def finished_message(event: Finished) -> pb.GenerationFinished:
    """Convert the last event."""
    return pb.GenerationFinished(
        reason=pb.FinishReason.Value(f"FINISH_REASON_{event.reason.name}"),
        matched_stop=event.matched_stop,
        matched_stop_token_id=event.matched_stop_token_id,
        usage=pb.Usage(**event.usage.model_dump()),
        cache=pb.CacheStatistics(**event.cache.model_dump()),
        timings=pb.Timings(
            queue_seconds=event.timings.queue_s,
            prefill_seconds=event.timings.prefill_s,
            decode_seconds=event.timings.decode_s,
        ),
    )


def identity_message(identity: ModelIdentity) -> pb.ModelIdentity:
    """Convert a model's identity."""
    return pb.ModelIdentity(**identity.model_dump())


def table_list_message(store: TableStore) -> pb.ListAlphaTablesResponse:
    """Convert the list of tables."""
    return pb.ListAlphaTablesResponse(
        tables=[_summary(table) for table in store.tables.values()],
        refused=refused_messages(store.refused),
        default_table=store.default or "",
        etag=store.etag,
    )


def refused_messages(refused: Mapping[str, TableError]) -> list[pb.RefusedAlphaTable]:
    """Convert the reasons of refused files, by name."""
    return [pb.RefusedAlphaTable(name=name, reason=str(why)) for name, why in refused.items()]


def table_message(table: AlphaTable) -> pb.GetAlphaTableResponse:
    """Convert one table, to typed fields and to the canonical JSON of its file."""
    dealt = table.policy.head_share
    policy = table.policy.model_dump(exclude={"alpha", "head_share"}, exclude_none=True)
    return pb.GetAlphaTableResponse(
        table=pb.AlphaTable(
            summary=_summary(table),
            model=identity_message(table.model),
            layers=[pb.LayerAlphas(alphas=row) for row in table.policy.alpha],
            layer_share=[math.fsum(row) / len(row) for row in dealt],
            head_share=[pb.HeadShares(shares=row) for row in dealt],
            head_budgets=head_messages(_budgets(table)),
            **policy,
        ),
        canonical_json=canonical_json(table.model_dump(mode="json")),
    )


def _budgets(table: AlphaTable) -> Heads:
    """Return each head's budget for a sequence so long that no head can keep all of it.

    Empty if the table's budget is a ratio, or if no request can be served with the table's own
    budget because it has no room for the tokens that the table protects.
    """
    if table.policy.budget is None:
        return ()
    identity = table.model
    most = table.policy.budget * identity.num_layers * identity.num_kv_heads + 1
    try:
        return resolve(
            CachePolicy(),
            table=table,
            server=CachePolicy(table=table.name),
            length=most,
            slots=most,
            num_layers=identity.num_layers,
            num_kv_heads=identity.num_kv_heads,
        ).head_budgets
    except InvalidArgument:
        return ()


def _summary(table: AlphaTable) -> pb.AlphaTableSummary:
    created_at = Timestamp()
    created_at.FromDatetime(table.created_at)
    return pb.AlphaTableSummary(
        name=table.name,
        sha256=table.sha256,
        dataset=table.calibration.dataset,
        verdict=pb.TableVerdict.Value(f"TABLE_VERDICT_{table.evidence.verdict.upper()}"),
        created_at=created_at,
    )


def head_messages(heads: Heads) -> list[pb.HeadTokens]:
    """Convert numbers per layer and KV head."""
    return [pb.HeadTokens(tokens=row) for row in heads]


def layer_means(heads: Heads) -> list[int]:
    """Return the mean over each layer's heads, rounded to the nearest integer, halves up."""
    return [(2 * sum(row) + len(row)) // (2 * len(row)) for row in heads]


def _effective_message(policy: EffectivePolicy) -> pb.EffectiveCachePolicy:
    message = pb.EffectiveCachePolicy(
        budget=policy.budget,
        layer_budgets=layer_means(policy.head_budgets),
        recent=policy.recent,
        layer_recents=layer_means(policy.head_recents),
        head_budgets=head_messages(policy.head_budgets),
        head_recents=head_messages(policy.head_recents),
        sinks=policy.sinks,
        prefill_chunk=policy.prefill_chunk,
        random_seed=policy.random_seed,
        min_budget=policy.min_budget,
    )
    if policy.method in PRESETS:
        message.preset = preset_value(policy.method)
    elif policy.method == "table":
        message.table.name = policy.table_name or ""
        message.table.sha256 = policy.table_sha256 or ""
    else:
        message.alpha = policy.alpha[0][0]
    return message
