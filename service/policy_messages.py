"""Converts cache policies to and from messages, for server and client.

Owns the mapping of the policy's fields and presets, and the words for a policy. A field has the
same name here, in the core and in the alpha table, so the conversion is a copy. Knows nothing of
the rest of a request.
"""

from typing import Any

from google.protobuf.message import Message

from a2sf.errors import InvalidRequest
from a2sf.policy import PRESETS, CachePolicy, EffectivePolicy, Heads
from service.pb import inference_pb2 as pb
from service.status import field_prefix

_PREFIX = "CACHE_PRESET_"


def policy_from_message(
    message: pb.CachePolicy, where: str = "default_cache_policy"
) -> CachePolicy:
    """Read a cache policy; `where` is the name of its field in the request or response.

    Raises InvalidRequest with every field that is out of range.
    """
    values = set_fields(message)
    if "preset" in values:
        # An unknown number is kept, so that its error is reported with those of other fields.
        values["preset"] = _preset_names().get(values["preset"], values["preset"])
    with field_prefix(where):
        return CachePolicy(**values)


def policy_to_message(policy: CachePolicy) -> pb.CachePolicy:
    """Convert a cache policy to a message."""
    values = policy.model_dump(exclude_none=True)
    if "preset" in values:
        values["preset"] = preset_value(values["preset"])
    return pb.CachePolicy(**values)


def effective_policy_to_message(policy: EffectivePolicy) -> pb.EffectiveCachePolicy:
    """Convert the policy that a sequence was admitted with."""
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


def head_messages(heads: Heads) -> list[pb.HeadTokens]:
    """Convert numbers per layer and KV head."""
    return [pb.HeadTokens(tokens=row) for row in heads]


def layer_means(heads: Heads) -> list[int]:
    """Return the mean over each layer's heads, rounded to the nearest integer, halves up."""
    return [(2 * sum(row) + len(row)) // (2 * len(row)) for row in heads]


def describe_policy(policy: CachePolicy, raised_by: int | None = None) -> str:
    """Describe a policy in one line: method, window, budget and lower bound.

    `raised_by`: the lower bound that raised the budget, if one did.
    """
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
        if raised_by is not None:
            parts.append(f"raised by min_budget {raised_by}")
    elif policy.budget_ratio is not None:
        floor = f", at least {policy.min_budget}" if policy.min_budget else ""
        parts.append(f"budget {policy.budget_ratio:g} of prompt + new tokens{floor}")
    return ", ".join(parts)


def preset_name(value: int) -> str:
    """Return the core's name of a preset. Raises InvalidRequest for an unknown value."""
    names = _preset_names()
    if value not in names:
        raise InvalidRequest([("preset", f"{value}; accepted: {', '.join(names.values())}")])
    return names[value]


def _preset_names() -> dict[int, str]:
    return {v: k.removeprefix(_PREFIX).lower() for k, v in pb.CachePreset.items() if v}


def preset_value(name: str) -> pb.CachePreset.ValueType:
    """Return the enum value of a preset in messages."""
    return pb.CachePreset.Value(_PREFIX + name.upper())


def set_fields(message: Message) -> dict[str, Any]:
    """Return the fields of `message` that are set, by name.

    A field with presence is included if it is set, even to 0; any other field only if it is not 0.
    Wherever this is used, the core's default for those other fields is 0.
    """
    return {field.name: value for field, value in message.ListFields()}
