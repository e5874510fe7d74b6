"""The cache policy on the wire, read and written by server and client alike.

Owns the correspondence of the policy's fields and presets: a field is called the same here, in the
core and in the alpha table, so this is a copy. Knows nothing of the rest of a request.
"""

from typing import Any

from google.protobuf.message import Message

from a2sf.errors import InvalidRequest
from a2sf.policy import CachePolicy
from service.pb import inference_pb2 as pb
from service.status import fields_of

_PREFIX = "CACHE_PRESET_"


def policy_from_message(
    message: pb.CachePolicy, where: str = "default_cache_policy"
) -> CachePolicy:
    """Read a cache policy; `where` is its own name in the request or answer.

    Raises InvalidRequest with every field that is out of range.
    """
    values = set_fields(message)
    if "preset" in values:
        # A number that is none is refused as the value that it is, beside what else is wrong.
        values["preset"] = _preset_names().get(values["preset"], values["preset"])
    with fields_of(where):
        return CachePolicy(**values)


def policy_to_message(policy: CachePolicy) -> pb.CachePolicy:
    """Write a cache policy."""
    values = policy.model_dump(exclude_none=True)
    if "preset" in values:
        values["preset"] = preset_value(values["preset"])
    return pb.CachePolicy(**values)


def in_words(policy: CachePolicy) -> str:
    """Put the policy of a request that gives none into one line: method, window, budget, floor."""
    if policy.table is not None:
        method = f"table {policy.table}"
    else:
        method = policy.preset or f"a2sf, alpha {policy.alpha:g}"
    parts = [method]
    if policy.recent_share is not None:
        parts.append(f"{policy.recent_share:g} of the rest recent")
    elif policy.recent is not None:
        parts.append(f"{policy.recent} tokens recent")
    if policy.budget is not None:
        parts.append(f"budget {policy.budget} tokens")
    elif policy.budget_ratio is not None:
        floor = f", at least {policy.min_budget}" if policy.min_budget else ""
        parts.append(f"budget {policy.budget_ratio:g} of prompt + new tokens{floor}")
    return ", ".join(parts)


def preset_name(value: int) -> str:
    """Return the core's name of a preset. Raises InvalidRequest for a value that is none."""
    names = _preset_names()
    if value not in names:
        raise InvalidRequest([("preset", f"{value}; accepted: {', '.join(names.values())}")])
    return names[value]


def _preset_names() -> dict[int, str]:
    return {v: k.removeprefix(_PREFIX).lower() for k, v in pb.CachePreset.items() if v}


def preset_value(name: str) -> pb.CachePreset.ValueType:
    """Return the wire's value of a preset."""
    return pb.CachePreset.Value(_PREFIX + name.upper())


def set_fields(message: Message) -> dict[str, Any]:
    """Return the fields of `message` that are set, by name.

    Fields with presence count once set, be it to 0; the others where they are not 0, and wherever
    this is used the core's own default is 0 then.
    """
    return {field.name: value for field, value in message.ListFields()}
