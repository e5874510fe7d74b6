"""Every number of a request over the wire, at its limits and just outside them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from service.pb import inference_pb2 as pb
from tests.service.bad_inputs.conftest import CONTEXT, SLOTS, VOCABULARY, Served, input_of, read


@dataclass(frozen=True)
class Limits:
    """The least and the most that are accepted, and what is just beyond, if the type holds it."""

    least: float
    most: float
    below: float | None = None
    above: float | None = None
    beside: dict[str, Any] = field(default_factory=dict)
    """Other fields of the request that this one needs."""
    named: str | None = None
    """The field that a refusal names, where it is another."""


def reals(least: float, most: float) -> Limits:
    return Limits(
        least, most, below=math.nextafter(least, -math.inf), above=math.nextafter(most, math.inf)
    )


POLICY = {"alpha": 0.5, "budget": 32, "sinks": 4}
UINT32 = 2**32 - 1
TINIEST, NEXT_TO_1 = math.nextafter(0, 1), math.nextafter(1, 2)

LIMITS: dict[str, Limits] = {
    "token_ids.ids": Limits(0, VOCABULARY - 1, above=VOCABULARY, named="prompt"),
    # After a prompt of one token.
    "max_new_tokens": Limits(1, CONTEXT - 1, below=0, above=CONTEXT),
    "min_new_tokens": Limits(0, 4, above=5, beside={"max_new_tokens": 4}),
    "time_limit_seconds": Limits(TINIEST, math.nextafter(math.inf, 0), below=0.0),
    "stop_token_ids": Limits(0, VOCABULARY - 1, above=VOCABULARY),
    "sampling.repetition_penalty": reals(0.01, 100),
    "sampling.temperature": reals(0, 100),
    "sampling.top_k": Limits(0, UINT32),
    "sampling.top_p": Limits(TINIEST, 1, below=0.0, above=NEXT_TO_1),
    "sampling.min_p": reals(0, 1),
    "sampling.seed": Limits(0, 2**63 - 1, above=2**63),
    "output.top_logprobs": Limits(0, 20, above=21, beside={"output": {"logprobs": True}}),
    "cache_policy.alpha": reals(0, 1),
    "cache_policy.preset": Limits(1, 5, below=0, above=6),
    "cache_policy.budget": Limits(
        1, SLOTS, below=0, above=SLOTS + 1, beside={"cache_policy": {"sinks": 0}}
    ),
    # Of 5 tokens, 0.1 is half a slot, which is rounded up.
    "cache_policy.budget_ratio": Limits(
        *(0.1, 1, TINIEST, NEXT_TO_1), beside={"cache_policy": {"sinks": 0, "min_budget": 0}}
    ),
    # No floor is more than the request needs, and no number is none.
    "cache_policy.min_budget": Limits(
        0, UINT32, beside={"cache_policy": {"budget_ratio": 0.5, "sinks": 0}}
    ),
    "cache_policy.recent": Limits(
        0, 27, above=28, beside={"cache_policy": POLICY}, named="cache_policy.budget"
    ),
    "cache_policy.recent_share": Limits(
        0, 1, below=-TINIEST, above=NEXT_TO_1, beside={"cache_policy": POLICY}
    ),
    "cache_policy.sinks": Limits(
        0, 31, above=32, beside={"cache_policy": POLICY}, named="cache_policy.budget"
    ),
    "cache_policy.prefill_chunk": Limits(0, UINT32),
    "cache_policy.random_seed": Limits(
        0, 2**31 - 1, above=2**31, beside={"cache_policy": {"preset": 5}}
    ),
}


def numbers(message: Descriptor, prefix: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    """Every field of `message` that holds numbers, by its dotted name."""
    for one in message.fields:
        if one.message_type is not None:
            yield from numbers(one.message_type, f"{prefix}{one.name}.")
        elif one.type not in (one.TYPE_BOOL, one.TYPE_STRING, one.TYPE_BYTES):
            yield prefix + one.name, one


NUMBERS = dict(numbers(pb.GenerationInput.DESCRIPTOR))


def with_number(path: str, value: float) -> pb.GenerationInput:
    """A request that is good but for this value."""
    message = input_of(**LIMITS[path].beside)
    *parents, name = path.split(".")
    holder: Message = message
    for parent in parents:
        holder = getattr(holder, parent)
    number = value if NUMBERS[path].cpp_type == FieldDescriptor.CPPTYPE_DOUBLE else int(value)
    if NUMBERS[path].is_repeated:
        getattr(holder, name).append(number)
    else:
        setattr(holder, name, number)
    return message


def test_every_number_of_a_request_has_its_limits_here() -> None:
    asked = dict(
        found
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        for found in numbers(method.input_type)
    )
    assert set(asked) == {f"input.{path}" for path in LIMITS}


def test_no_number_of_a_request_becomes_infinite_on_the_wire() -> None:
    """Of a `float` set to 1e40 protobuf makes infinity, without an error on either side."""
    assert not {path for path, one in NUMBERS.items() if one.type == one.TYPE_FLOAT}


@pytest.mark.parametrize("path", LIMITS)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_number_at_its_limits_is_accepted(served: Served, path: str) -> None:
    for value in (LIMITS[path].least, LIMITS[path].most):
        started = await served.start(with_number(path, value))
        assert started.prompt_tokens == 1, (path, value)


@pytest.mark.parametrize("path", LIMITS)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_number_outside_its_limits_is_refused_by_name(served: Served, path: str) -> None:
    limits = LIMITS[path]
    beyond = [value for value in (limits.below, limits.above) if value is not None]
    if NUMBERS[path].cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        beyond += [math.nan, math.inf, -math.inf]
    for value in beyond:
        message = pb.GenerateRequest(input=with_number(path, value))
        status = read(await served.refusal(message.SerializeToString()))
        assert (status.code, status.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "InvalidArgument",
        ), (
            path,
            value,
        )
        assert status.field == f"input.{limits.named or path}", (path, value)
