"""Messages to the core's values, and the core's values to messages: the server's side.

Owns the correspondence of names. A field is called the same in the proto, in the core and in the
alpha table wherever it means the same, so most of this is a copy. Raises
InvalidRequest with dotted proto names. Knows nothing of channels, handlers or threads.
"""

import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from a2sf.errors import InvalidArgument, TableError
from a2sf.policy import PRESETS, CachePolicy, EffectivePolicy
from a2sf.requests import Delta, Event, Finished, GenerationRequest, Sampling, Started
from a2sf.schema import AlphaTable, ModelIdentity, canonical_json
from service.pb import inference_pb2 as pb
from service.policies import preset_value, set_fields
from service.status import InvalidRequest, from_validation

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@contextmanager
def proto_fields() -> Iterator[None]:
    """Within, errors that name a field by the core's name come out naming it by the proto's."""
    try:
        yield
    except ValidationError as error:
        found = from_validation(error)
        raise InvalidRequest(
            (_proto_field(f), problem) for f, problem in found.violations
        ) from None
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
    return f"input.{field}"


def request_id(message: pb.GenerationInput) -> str:
    """Return the request's own id, or a new one. Raises InvalidRequest for one unfit for logs."""
    if not message.request_id:
        return uuid.uuid4().hex
    if not _REQUEST_ID.fullmatch(message.request_id):
        raise InvalidRequest(
            [("input.request_id", "accepted: 1 to 128 characters of A-Z a-z 0-9 . _ : -")]
        )
    return message.request_id


def prompt(message: pb.GenerationInput) -> str | tuple[int, ...]:
    """Return the prompt as text or token ids. Raises InvalidRequest where there is none."""
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest([("input.prompt", "missing; give text or token_ids")])
    if kind == "text":
        if not message.text:
            raise InvalidRequest([("input.text", "empty; give at least one character")])
        return message.text
    if not message.token_ids.ids:
        raise InvalidRequest([("input.token_ids.ids", "empty; give at least one token id")])
    return tuple(message.token_ids.ids)


def generation_request(
    message: pb.GenerationInput,
    *,
    name: str,
    prompt_ids: tuple[int, ...],
    policy: CachePolicy,
    table: AlphaTable | None,
) -> GenerationRequest:
    """Put a request together from its message and what was already read or looked up of it."""
    with proto_fields():
        return GenerationRequest(
            request_id=name,
            prompt_ids=prompt_ids,
            max_new_tokens=message.max_new_tokens,
            sampling=Sampling(**set_fields(message.sampling)),
            stop=tuple(message.stop),
            stop_token_ids=tuple(message.stop_token_ids),
            ignore_eos=message.ignore_eos,
            cache_policy=policy,
            table=table,
        )


def stream_response(event: Event, output: pb.OutputOptions) -> pb.StreamGenerateResponse:
    """Write one event of a stream."""
    match event:
        case Started():
            return pb.StreamGenerateResponse(started=started_message(event))
        case Delta():
            ids = event.token_ids if output.token_ids else ()
            return pb.StreamGenerateResponse(
                delta=pb.GenerationDelta(text=event.text, token_ids=ids)
            )
        case Finished():
            return pb.StreamGenerateResponse(finished=finished_message(event))


def started_message(event: Started) -> pb.GenerationStarted:
    """Write the first event."""
    return pb.GenerationStarted(
        request_id=event.request_id,
        cache_policy=_effective_message(event.policy),
        prompt_tokens=event.prompt_tokens,
        seed=event.seed,
    )


def finished_message(event: Finished) -> pb.GenerationFinished:
    """Write the last event."""
    return pb.GenerationFinished(
        # TIME_LIMIT has no value in the contract, and no request made here sets time_limit_s.
        reason=pb.FinishReason.Value(f"FINISH_REASON_{event.reason.name}"),
        matched_stop=event.matched_stop,
        usage=pb.Usage(**event.usage.model_dump()),
        cache=pb.CacheStatistics(**event.cache.model_dump()),
        timings=pb.Timings(
            queue_seconds=event.timings.queue_s,
            prefill_seconds=event.timings.prefill_s,
            decode_seconds=event.timings.decode_s,
        ),
    )


def identity_message(identity: ModelIdentity) -> pb.ModelIdentity:
    """Write a model's identity."""
    return pb.ModelIdentity(**identity.model_dump())


def table_list_message(
    tables: Mapping[str, AlphaTable], refused: Mapping[str, TableError]
) -> pb.ListAlphaTablesResponse:
    """Write the list of tables."""
    return pb.ListAlphaTablesResponse(
        tables=[_summary(table) for table in tables.values()],
        refused=[pb.RefusedAlphaTable(name=name, reason=str(why)) for name, why in refused.items()],
    )


def table_message(table: AlphaTable) -> pb.GetAlphaTableResponse:
    """Write one table, typed and as the canonical JSON of its file."""
    policy = table.policy.model_dump(exclude={"alpha"}, exclude_none=True)
    return pb.GetAlphaTableResponse(
        table=pb.AlphaTable(
            summary=_summary(table),
            model=identity_message(table.model),
            layers=[pb.LayerAlphas(alphas=row) for row in table.policy.alpha],
            **policy,
        ),
        canonical_json=canonical_json(table.model_dump(mode="json")),
    )


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


def _effective_message(policy: EffectivePolicy) -> pb.EffectiveCachePolicy:
    message = pb.EffectiveCachePolicy(
        budget=policy.budget,
        layer_budgets=policy.layer_budgets,
        recent=policy.recent,
        layer_recents=policy.layer_recents,
        sinks=policy.sinks,
        prefill_chunk=policy.prefill_chunk,
        random_seed=policy.random_seed,
    )
    if policy.method in PRESETS:
        message.preset = preset_value(policy.method)
    elif policy.method == "table":
        message.table.name = policy.table_name or ""
        message.table.sha256 = policy.table_sha256 or ""
    else:
        message.alpha = policy.alpha[0][0]
    return message
