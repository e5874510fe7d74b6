"""The inputs of a completion, and the messages that they become.

The counterpart of `service.rpc.conversions.requests`, separate from it so that a client loads
neither engine nor torch. Owns the options of a request, which values fit which field, and the
errors about those that do not. Knows nothing of channels and responses.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from a2sf.errors import InvalidArgument
from a2sf.policy import CachePolicy
from a2sf.requests import ChatMessage, Sampling
from a2sf.validation import Given
from service.pb import inference_pb2 as pb
from service.policy_messages import policy_to_message
from service.status import Violations, field_prefix

MessageT = TypeVar("MessageT", bound=Message)
GivenT = TypeVar("GivenT", bound=Given)

Chat: TypeAlias = Sequence[ChatMessage | Mapping[str, str]]
"""A conversation: `ChatMessage` values, or mappings with the same fields."""


class GenerationOptions(TypedDict, total=False):
    """Options of a completion besides prompt and length; all are optional."""

    min_new_tokens: int
    """Until this many tokens, nothing but the time limit ends the completion."""
    time_limit_s: float
    """Seconds after which the completion ends with the tokens so far; unlike a deadline, it loses
    nothing."""
    sampling: Sampling | Mapping[str, Any]
    """How tokens are sampled: a `Sampling`, or a mapping with the same fields."""
    stop: Sequence[str]
    """Strings that end the completion; its text does not include them."""
    stop_token_ids: Sequence[int]
    """Token ids that end the completion; its text does not include them."""
    ignore_eos: bool
    """Continue past the model's end-of-sequence tokens, and past the end of the assistant's turn in
    a chat."""
    special_tokens_in_content: bool
    """Encode control tokens that chat messages spell out as control tokens, not as text."""
    cache_policy: CachePolicy | Mapping[str, Any]
    """What the cache may evict: a `CachePolicy`, or a mapping with the same fields; by default the
    server's policy."""
    request_id: str
    """Id of the request in the server's logs; by default the server makes a random one."""
    token_ids: bool
    """Whether the response has token ids besides the text."""
    logprobs: bool
    """Whether the response has the log-probability of each token."""
    top_logprobs: int
    """How many of the most likely tokens to return per step; needs `logprobs`."""
    echo: bool
    """Whether the first event has the prompt as the model reads it."""


def generation_input(
    prompt: str | Sequence[int] | Chat, max_new_tokens: int, options: GenerationOptions
) -> pb.GenerationInput:
    """Make the message of a request.

    Raises InvalidArgument for a value that does not fit its field, and TypeError for an unknown
    option, for callers without a type checker.
    """
    if unknown := options.keys() - GenerationOptions.__annotations__.keys():
        raise TypeError(
            f"no such option: {', '.join(sorted(unknown))}; accepted: "
            f"{', '.join(sorted(GenerationOptions.__annotations__))}"
        )
    violations, message = Violations(), pb.GenerationInput()
    output = {name: options.get(name) for name in pb.OutputOptions.DESCRIPTOR.fields_by_name}
    with violations.collect():
        if isinstance(options.get("stop"), str):
            # A string is a sequence too, but of one-character strings.
            raise InvalidArgument("input.stop", "one string; give a list of strings")
        message.stop.extend(_build(pb.GenerationInput, "input.", stop=options.get("stop")).stop)
    with violations.collect():
        sampling = _value(Sampling, options.get("sampling"), "input.sampling")
        sampling_fields = sampling.model_dump(exclude_none=True)
        message.sampling.CopyFrom(_build(pb.Sampling, "input.sampling.", **sampling_fields))
    with violations.collect():
        policy = _value(CachePolicy, options.get("cache_policy"), "input.cache_policy")
        message.cache_policy.CopyFrom(_policy(policy))
    with violations.collect():
        message.output.CopyFrom(_build(pb.OutputOptions, "input.output.", **output))
    with violations.collect():
        message.MergeFrom(
            _build(
                pb.GenerationInput,
                "input.",
                request_id=options.get("request_id"),
                max_new_tokens=max_new_tokens,
                min_new_tokens=options.get("min_new_tokens"),
                time_limit_seconds=options.get("time_limit_s"),
                stop_token_ids=options.get("stop_token_ids"),
                ignore_eos=options.get("ignore_eos"),
            )
        )
    with violations.collect():
        special = options.get("special_tokens_in_content", False)
        _write_prompt(prompt, message, "input.", special=special)
    violations.check()
    return message


def tokenize_request(
    prompt: str | Chat, special_tokens_in_content: bool = False
) -> pb.TokenizeRequest:
    """Make a tokenize request. Raises InvalidArgument for a value that does not fit its field."""
    message = pb.TokenizeRequest()
    _write_prompt(prompt, message, "", special=special_tokens_in_content)
    return message


def _build(cls: type[MessageT], where: str, **fields: Any) -> MessageT:
    # One field at a time, because protobuf does not say which value does not fit its field.
    message, violations = cls(), Violations()
    for name, value in fields.items():
        with violations.collect():
            message.MergeFrom(_with_one_field(cls, where, name, value))
    violations.check()
    return message


def _with_one_field(cls: type[MessageT], where: str, name: str, value: Any) -> MessageT:
    """Make a message with one field; None leaves it unset."""
    try:
        part = cls(**{name: value})
    except (ValueError, OverflowError) as error:
        problem = f"{error}{_accepted_range(cls.DESCRIPTOR.fields_by_name[name].type)}"
        raise InvalidArgument(f"{where}{name}", problem) from error
    # A float that is too large for its field silently becomes infinite.
    if isinstance(value, int | float) and not math.isfinite(getattr(part, name)):
        raise InvalidArgument(
            f"{where}{name}",
            f"{value!r} is not a finite number in this field; accepted: finite numbers",
        )
    return part


def _accepted_range(kind: int) -> str:
    """Return the accepted range of an integer field, as a suffix; empty for other types."""
    bits = {FieldDescriptor.TYPE_UINT32: 32, FieldDescriptor.TYPE_UINT64: 64}.get(kind)
    return f"; accepted: 0 to {2**bits - 1}" if bits else ""


def _value(cls: type[GivenT], given: object, where: str) -> GivenT:
    """Return `given`, or the value that a mapping describes; None: the defaults of all fields."""
    if given is None:
        return cls()
    if isinstance(given, Mapping):
        return _from_mapping(cls, given, where)
    if not isinstance(given, cls):
        raise InvalidArgument(
            where,
            f"{type(given).__name__}; accepted: a {cls.__name__}, or a mapping with its fields",
        )
    return given


def _from_mapping(cls: type[GivenT], given: Mapping[Any, Any], where: str) -> GivenT:
    with field_prefix(where):
        # Only strings can be names of fields; another key is refused by its own text.
        return cls(**{str(key): value for key, value in given.items()})


def _policy(policy: CachePolicy) -> pb.CachePolicy:
    try:
        return policy_to_message(policy)
    except ValueError as error:
        raise InvalidArgument("input.cache_policy", str(error)) from error


def _write_prompt(
    prompt: str | Sequence[int] | Chat,
    message: pb.GenerationInput | pb.TokenizeRequest,
    where: str,
    *,
    special: bool,
) -> None:
    if isinstance(prompt, (bytes, bytearray)):
        raise InvalidArgument(f"{where}prompt", "bytes; decode them, or give token ids as a list")
    if isinstance(prompt, str):
        message.text = _build(type(message), where, text=prompt).text
        return
    has_ids = isinstance(message, pb.GenerationInput)
    accepted = "text, a list of token ids, or a list of chat messages"
    if not has_ids:
        accepted = "text, or a list of chat messages"
    if not isinstance(prompt, Sequence):
        raise InvalidArgument(f"{where}prompt", f"{type(prompt).__name__}; accepted: {accepted}")
    if not prompt:
        raise InvalidArgument(
            f"{where}prompt",
            f"an empty {type(prompt).__name__} is neither token ids nor a chat; "
            f"accepted: {accepted}",
        )
    ids = [part for part in prompt if isinstance(part, int)]
    if len(ids) < len(prompt):
        if ids:
            raise InvalidArgument(
                f"{where}prompt", "token ids and chat messages in one list; give one kind"
            )
        message.chat.messages.extend(
            _chat_message(part, f"{where}chat.messages[{index}]")
            for index, part in enumerate(prompt)
        )
        message.chat.special_tokens_in_content = special
    elif isinstance(message, pb.GenerationInput):
        message.token_ids.SetInParent()
        message.token_ids.MergeFrom(_build(pb.TokenIds, f"{where}token_ids.", ids=ids))
    else:
        raise InvalidArgument("prompt", "not text; give text, or at least one chat message")


def _chat_message(part: object, where: str) -> pb.ChatMessage:
    if isinstance(part, Mapping):
        part = _from_mapping(ChatMessage, part, where)
    if not isinstance(part, ChatMessage):
        raise InvalidArgument(where, "accepted: a ChatMessage, or a mapping of role and content")
    one = part
    return _build(pb.ChatMessage, f"{where}.", role=one.role, content=one.content)
