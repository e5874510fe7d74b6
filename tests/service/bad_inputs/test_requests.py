"""Bad requests over the wire: each gets its error, and the next good request works."""

from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from service.pb import inference_pb2 as pb
from tests.service.bad_inputs.conftest import (
    GENERATE,
    GOOD,
    INFERENCE,
    MAX_MESSAGE_BYTES,
    MAX_PROMPT_BYTES,
    STREAM,
    Served,
    generation,
    read,
)
from tests.service.wire import tagged, varint

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENIZE = INFERENCE + "Tokenize"
MODEL = "/a2sf.inference.v1.ModelService/"
GET_TABLE, LIST_TABLES = MODEL + "GetAlphaTable", MODEL + "ListAlphaTables"

C = grpc.StatusCode


def chat(*messages: tuple[str, str]) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role=r, content=c) for r, c in messages])


def table(name: str) -> bytes:
    return generation(cache_policy=pb.CachePolicy(table=name))


@dataclass(frozen=True)
class Case:
    """A request, and what must be said of it."""

    request: bytes
    code: grpc.StatusCode
    reason: str | None
    field: str | None
    says: str
    method: str = GENERATE
    options: dict[str, Any] = field(default_factory=dict)


def bad(request: bytes, field: str, says: str, method: str = GENERATE) -> Case:
    return Case(request, C.INVALID_ARGUMENT, "InvalidArgument", field, says, method)


def unreadable(request: bytes, method: str = GENERATE) -> Case:
    return bad(request, "request", "cannot be read", method)


def no_table(name: str) -> Case:
    return Case(table(name), C.NOT_FOUND, "NotFound", None, "no alpha table")


def by_grpc(request: bytes, code: grpc.StatusCode, says: str, **options: Any) -> Case:
    method = options.pop("method", GENERATE)
    return Case(request, code, None, None, says, method, options)


GZIP = {"compression": grpc.Compression.Gzip}

BAD: dict[str, Case] = {
    # What is no message.
    "a string that is not UTF-8": unreadable(tagged(1, tagged(2, b"\xff\xfe") + tagged(4, 4))),
    "the same to a stream": unreadable(tagged(1, tagged(2, b"\xff\xfe")), STREAM),
    "the same to Tokenize": unreadable(tagged(1, b"\xc3"), TOKENIZE),
    "the same to GetAlphaTable": unreadable(tagged(1, b"\xed\xa0\x80"), GET_TABLE),
    "cut short": unreadable(GOOD[:-1]),
    "random bytes": unreadable(bytes(range(255, 0, -1))),
    "groups that never end": unreadable(b"\x0b" * 10_000),
    "a length of 2^63": unreadable(b"\x0a" + varint(2**63)),
    # What is a message, and no request.
    "nothing": bad(b"", "input.prompt", "give one of text, token_ids, chat"),
    "no text": bad(generation(text=""), "input.text", "empty"),
    "no token ids": bad(generation(token_ids={}), "input.token_ids.ids", "empty"),
    "no messages": bad(generation(chat={}), "input.chat.messages", "empty"),
    "nothing to tokenize": bad(b"", "prompt", "give one of text, chat", TOKENIZE),
    "a long text": bad(generation(text="é" * 2049), "input.text", "4098 bytes; accepted: at most"),
    "a long text to tokenize": bad(tagged(1, b"x" * 4097), "text", "4097 bytes", TOKENIZE),
    "long messages": bad(
        generation(chat=chat(("user", "x" * 4000), ("user", "x" * 97))),
        "input.chat.messages",
        "accepted: at most 4096",
    ),
    "messages that are long only with their roles": bad(
        generation(chat=chat(*[("r" * 64, "")] * 100)),
        "input.chat.messages",
        "accepted: at most 4096",
    ),
    "messages that are long only by the template": bad(
        generation(chat=chat(*[("r", "")] * 1400)),
        "input.chat.messages",
        "4200 bytes; accepted: at most 4096",
    ),
    "a million token ids": bad(
        generation(token_ids={"ids": [1] * 10**6}), "input.prompt", "1000000 tokens"
    ),
    "a role that is none": bad(
        generation(chat=chat(("user", "x"), ("a b", "x"))), "input.chat.messages[1].role", "match"
    ),
    "no role": bad(generation(chat=chat(("", "x"))), "input.chat.messages[0].role", "match"),
    "a role of 65 characters": bad(
        generation(chat=chat(("r" * 65, "x"))), "input.chat.messages[0].role", "match"
    ),
    "a role that the template refuses": bad(
        generation(chat=chat(("ghost", "x"))), "input.chat.messages", "roles are ghost"
    ),
    "17 stop strings": bad(generation(stop=["s"] * 17), "input.stop", "at most 16"),
    "a million empty stop strings": bad(generation(stop=[""] * 10**6), "input.stop", "at most 16"),
    "an empty stop string": bad(generation(stop=["s", ""]), "input.stop[1]", "at least 1"),
    "a stop string of 257": bad(generation(stop=["s" * 257]), "input.stop[0]", "at most 256"),
    "129 stop tokens": bad(generation(stop_token_ids=[1] * 129), "input.stop_token_ids", "128"),
    "an id of 129 characters": bad(generation(request_id="r" * 129), "input.request_id", "128"),
    "an id that would forge a log": bad(generation(request_id="r\nr"), "input.request_id", "A-Z"),
    "top_logprobs alone": bad(
        generation(output={"top_logprobs": 1}), "input.output.top_logprobs", "set logprobs too"
    ),
    "preset full with a budget": bad(
        generation(cache_policy={"preset": 1, "budget": 8}), "input.cache_policy", "preset full"
    ),
    "a preset from another world": bad(
        generation(cache_policy={"preset": -1}), "input.cache_policy.preset", "accepted: full"
    ),
    "a varint of -1": bad(
        tagged(1, tagged(2, b"x") + tagged(4, 2**64 - 1)),
        "input.max_new_tokens",
        "4294967295 after a prompt",
    ),
    # Names that want to be more than names.
    "an unknown table": no_table("mathqa"),
    "a table up the tree": no_table("../../etc/passwd"),
    "a table from the root": no_table("/etc/passwd"),
    "a table with a NUL": no_table("broken\0"),
    "a table with its ending": no_table("broken.json"),
    "a table of no name": no_table(""),
    "a table with a long name": no_table("n" * 10**6),
    "a table with a long name of long characters": no_table("\N{FOX FACE}" * 10**5),
    "a table that is damaged": Case(
        table("broken"), C.FAILED_PRECONDITION, "TableCorrupt", None, "not whole JSON"
    ),
    "reading a table up the tree": Case(
        tagged(1, b"../../etc/passwd"), C.NOT_FOUND, "NotFound", None, "no alpha table", GET_TABLE
    ),
    "reading a table of no name": bad(b"", "name", "missing", GET_TABLE),
    "no such method": by_grpc(GOOD, C.UNIMPLEMENTED, "not found", method=INFERENCE + "Sing"),
    "no such service": by_grpc(GOOD, C.UNIMPLEMENTED, "not found", method="/etc/passwd"),
    "the admin service, on this port": by_grpc(
        b"", C.UNIMPLEMENTED, "not found", method="/a2sf.inference.v1.AdminService/GetLoad"
    ),
    # What gRPC itself stops.
    "a huge message": by_grpc(
        bytes(MAX_MESSAGE_BYTES + 1), C.RESOURCE_EXHAUSTED, "larger than max (3145729 vs."
    ),
    "a huge message in a small one": by_grpc(
        bytes(64 * 2**20), C.RESOURCE_EXHAUSTED, "Decompressed message larger", **GZIP
    ),
    "huge metadata": by_grpc(
        GOOD, C.RESOURCE_EXHAUSTED, "metadata size", metadata=[("x-huge", "m" * 10**5)]
    ),
    "no time at all": by_grpc(GOOD, C.DEADLINE_EXCEEDED, "Deadline", timeout=1e-6),
    "time that has passed": by_grpc(GOOD, C.DEADLINE_EXCEEDED, "Deadline", timeout=-1),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_request_gets_the_reason(served: Served, name: str) -> None:
    case = BAD[name]
    status = read(await served.refusal(case.request, case.method, **case.options))
    assert (status.code, status.reason, status.field) == (case.code, case.reason, case.field), (
        status
    )
    assert case.says in status.details
    assert "Error" not in status.details, "no exception of Python's, nor its class"


async def test_all_faults_of_a_request_are_reported_together(served: Served) -> None:
    request = generation(
        request_id="a b",
        text="",
        stop=[""],
        sampling={"temperature": -1.0, "top_p": 2.0},
        cache_policy={"alpha": 3.0, "prefill_chunk": 1, "random_seed": 2**31},
        output={"top_logprobs": 21},
    )
    status = read(await served.refusal(request))
    assert (status.code, status.reason) == (C.INVALID_ARGUMENT, "InvalidArgument")
    assert sorted(status.fields) == [
        "input.cache_policy.alpha",
        "input.cache_policy.random_seed",
        "input.output.top_logprobs",
        "input.request_id",
        "input.sampling.temperature",
        "input.sampling.top_p",
        "input.stop[0]",
        "input.text",
    ]


async def test_too_many_stops_and_an_unknown_preset_are_reported_together(served: Served) -> None:
    request = generation(stop=["s"] * 17, stop_token_ids=[1] * 129, cache_policy={"preset": 77})
    status = read(await served.refusal(request))
    assert sorted(status.fields) == [
        "input.cache_policy.preset",
        "input.stop",
        "input.stop_token_ids",
    ]


ODD: dict[str, bytes] = {
    "fields of a later version": GOOD + tagged(1, tagged(999, b"new")) + tagged(15, 7),
    "a number that has wrapped": tagged(1, tagged(2, b"x") + tagged(4, 2**32 + 4)),
    "two prompts, of which the last holds": GOOD + tagged(1, tagged(3, tagged(1, b"\x05"))),
    "two methods, of which the last holds": GOOD
    + tagged(1, tagged(9, b"\x11" + b"\xff" * 8 + tagged(3, 3))),
    "roles of 1 and 64 characters": generation(chat=chat(("r", "x"), ("r" * 64, ""))),
    "all the stops there may be": generation(
        stop=["s" * 256] * 16, stop_token_ids=[1] * 128, request_id="r" * 128
    ),
    "a text as long as may be": generation(text="x" * MAX_PROMPT_BYTES),
}


@pytest.mark.parametrize("name", ODD)
async def test_unusual_but_valid_requests_are_served(served: Served, name: str) -> None:
    answer = pb.GenerateResponse.FromString(await served.call(ODD[name]))
    assert 1 <= answer.finished.usage.completion_tokens <= 4


async def test_a_compressed_request_is_served(served: Served) -> None:
    text = generation(text="x" * MAX_PROMPT_BYTES)
    answer = await served.call(text, compression=grpc.Compression.Gzip)
    assert pb.GenerateResponse.FromString(answer).started.prompt_tokens == MAX_PROMPT_BYTES


async def test_invalid_table_files_are_listed_with_the_reason(served: Served) -> None:
    listed = pb.ListAlphaTablesResponse.FromString(await served.call(b"", LIST_TABLES))
    reasons = {table.name: table.reason for table in listed.refused}
    assert set(reasons) == {"broken", "long", "no-text-\N{REPLACEMENT CHARACTER}"}
    assert "not whole JSON" in reasons["broken"]
    assert "the file says sha256 '000" in reasons["long"]
