"""Reads requests: from messages to the core's values.

Owns the steps of reading a completion request (`read_request`), the names of fields in errors, and
which fields a request must have. A field with the same meaning has the same name in the proto and
in the core, so most of this is a copy. Raises InvalidRequest with dotted proto names. Knows nothing
of responses, handlers or threads.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from a2sf.errors import InvalidArgument, InvalidRequest
from a2sf.model.loader import LoadedModel
from a2sf.policy import CachePolicy
from a2sf.requests import (
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    ChatMessage,
    GenerationRequest,
    Sampling,
)
from a2sf.text import chat_template
from a2sf.text.detokenizer import vocabulary
from a2sf.validation import problems
from service.backend.tables import TableStore
from service.pb import inference_pb2 as pb
from service.policy_messages import policy_from_message, set_fields
from service.status import Violations, field_prefix

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@contextmanager
def proto_fields() -> Iterator[None]:
    """Rename fields in errors raised within the block, from core names to proto names."""
    try:
        yield
    except ValidationError as error:
        raise InvalidRequest((_proto_field(f), problem) for f, problem in problems(error)) from None
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


@dataclass(frozen=True)
class EncodedPrompt:
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


def valid_request_id(message: pb.GenerationInput) -> str | None:
    """Return the request's id; None without one, or if `read_request` would refuse it."""
    return message.request_id if _REQUEST_ID.fullmatch(message.request_id) else None


def read_request(
    message: pb.GenerationInput,
    tables: TableStore,
    model: LoadedModel,
    *,
    request_id: str,
    max_prompt_bytes: int,
) -> tuple[GenerationRequest, EncodedPrompt]:
    """Read a whole request, with its alpha table. May be slow: not for the event loop.

    Args:
        message: the request.
        tables: one state of the tables, so that a reload meanwhile changes nothing. A request that
            names no method gets their default table, if there is one.
        model: the served model.
        request_id: `valid_request_id`, or an id that the server made up.
        max_prompt_bytes: the longest prompt, in bytes of UTF-8.

    Raises InvalidRequest with everything that is invalid, the errors of `TableStore.lookup`, and
    those of rendering a chat.
    """
    violations, policy = Violations(), CachePolicy()
    # A placeholder if the prompt is invalid, so that the other fields are checked too.
    prompt = EncodedPrompt(None, (0,))
    with violations.collect():
        if message.request_id and valid_request_id(message) is None:
            raise InvalidRequest(
                [("input.request_id", "accepted: 1 to 128 characters of A-Z a-z 0-9 . _ : -")]
            )
    with violations.collect():
        policy = policy_from_message(message.cache_policy, "input.cache_policy")
    if not policy.names_method and tables.default is not None:
        policy = policy.model_copy(update={"table": tables.default})
    with violations.collect():
        prompt = read_prompt(message, model, max_prompt_bytes)
    with violations.collect():
        request = _generation_request(message, request_id, prompt, policy)
    violations.check()
    if policy.table is not None:
        request = request.model_copy(update={"table": tables.lookup(policy.table)})
    return request, prompt


def read_prompt(
    message: pb.GenerationInput | pb.TokenizeRequest,
    model: LoadedModel,
    max_bytes: int,
    prefix: str = "input.",
) -> EncodedPrompt:
    """Return the encoded prompt. May be slow for a long one: not for the event loop.

    `prefix` begins the names of fields in errors. Raises InvalidRequest if the prompt is missing
    or longer than `max_bytes` of UTF-8, and the errors of rendering a chat.
    """
    match message.WhichOneof("prompt"):
        case "text":
            if not message.text:
                raise InvalidRequest([(f"{prefix}text", "empty; give at least one character")])
            _check_size([message.text], max_bytes, f"{prefix}text")
            return EncodedPrompt(message.text, model.encode(message.text))
        case "chat":
            field = f"{prefix}chat.messages"
            if not message.chat.messages:
                raise InvalidRequest([(field, "empty; give at least one message")])
            texts = (text for m in message.chat.messages for text in (m.role, m.content))
            _check_size(texts, max_bytes, field)
            return _conversation(message.chat, model, max_bytes, field)
        case "token_ids" if isinstance(message, pb.GenerationInput):
            if not message.token_ids.ids:
                raise InvalidRequest(
                    [(f"{prefix}token_ids.ids", "empty; give at least one token id")]
                )
            return EncodedPrompt(None, tuple(message.token_ids.ids))
    kinds = ", ".join(f.name for f in message.DESCRIPTOR.oneofs_by_name["prompt"].fields)
    raise InvalidRequest([(f"{prefix}prompt", f"missing; give one of {kinds}")])


def _check_size(texts: Iterable[str], max_bytes: int, field: str) -> None:
    size = sum(len(text.encode()) for text in texts)
    if size > max_bytes:
        raise InvalidRequest([(field, f"{size} bytes; accepted: at most {max_bytes}")])


def _conversation(
    conversation: pb.ChatMessages, model: LoadedModel, max_bytes: int, field: str
) -> EncodedPrompt:
    messages = []
    for index, message in enumerate(conversation.messages):
        with field_prefix(f"{field}[{index}]"):
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
    return EncodedPrompt(read.text, read.token_ids, chat_template.turn_end_ids(model.tokenizer))


def _generation_request(
    message: pb.GenerationInput, request_id: str, prompt: EncodedPrompt, policy: CachePolicy
) -> GenerationRequest:
    violations = Violations()
    sampling = Sampling()
    lists: dict[str, Any] = {}
    for field, most in (("stop", MAX_STOP_STRINGS), ("stop_token_ids", MAX_STOP_TOKEN_IDS)):
        # Checked here, because pydantic would first validate every entry of a million.
        values = getattr(message, field)
        with violations.collect():
            if len(values) > most:
                raise InvalidArgument(
                    f"input.{field}", f"{len(values)} of them; accepted: at most {most}"
                )
            lists[field] = tuple(values)
    with violations.collect(), field_prefix("input.sampling"):
        sampling = Sampling(**set_fields(message.sampling))
    with violations.collect(), proto_fields():
        request = GenerationRequest(
            request_id=request_id,
            prompt_ids=prompt.token_ids,
            turn_end_ids=prompt.turn_end_ids,
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
    violations.check()
    return request
