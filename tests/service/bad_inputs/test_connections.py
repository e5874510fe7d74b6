"""Bad calls and connections, byte by byte; the requests are valid."""

import ssl
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import grpc
import pytest

from tests.service.bad_inputs.conftest import GENERATE, GOOD, STREAM, Served, generation
from tests.service.conftest import ENDLESS, until
from tests.service.wire import (
    PREFACE,
    Answer,
    framed,
    raw_call,
    until_hung_up_on,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

HALF_OPEN = 50

C = grpc.StatusCode


@dataclass(frozen=True)
class Call:
    """A call and what it ends with; None: without a status."""

    code: grpc.StatusCode | None
    says: str = ""
    body: bytes = framed(GOOD)
    headers: dict[str, str | bytes | None] = field(default_factory=dict)
    path: str = GENERATE


BAD: dict[str, Call] = {
    "a method that is not POST": Call(None, headers={":method": "GET"}),
    "no te": Call(None, headers={"te": None}),
    "a scheme of another age": Call(C.INTERNAL, ":scheme", headers={":scheme": "gopher"}),
    "a header in capitals": Call(C.INTERNAL, "header key", headers={"X-Loud": "x"}),
    "a binary header that is not base64": Call(C.INTERNAL, "x-bin", headers={"x-bin": "!"}),
    "a path up the tree": Call(C.UNIMPLEMENTED, "not found", path="/../../etc/passwd"),
    "no path": Call(C.UNIMPLEMENTED, "not found", path=""),
    "a deadline below 0": Call(C.INTERNAL, "grpc-timeout", headers={"grpc-timeout": "-5S"}),
    "a deadline in words": Call(C.INTERNAL, "grpc-timeout", headers={"grpc-timeout": "soon"}),
    "a deadline of 1 ns": Call(C.DEADLINE_EXCEEDED, headers={"grpc-timeout": "1n"}),
    "a length beyond the limit": Call(
        C.RESOURCE_EXHAUSTED, "4294967295 vs. 3145728", framed(GOOD, length=2**32 - 1)
    ),
    "a length that is too short": Call(
        C.INVALID_ARGUMENT, "cannot be read", framed(GOOD, length=3)
    ),
    "compressed, by its flag alone": Call(C.INTERNAL, "encoding", framed(GOOD, flags=1)),
    "compressed, by its header alone": Call(
        C.INTERNAL, "zlib", framed(GOOD, flags=1), {"grpc-encoding": "gzip"}
    ),
    "compressed as nobody can": Call(
        C.INTERNAL, "grpc-encoding", framed(GOOD, flags=1), {"grpc-encoding": "zork"}
    ),
    "another content type, which gRPC overlooks": Call(C.OK, headers={"content-type": "text/html"}),
    "a deadline beyond all time": Call(C.OK, headers={"grpc-timeout": "99999999H"}),
    "a header of no character set": Call(C.OK, headers={"x-odd": b"\x01\xff"}),
    "two messages, of which the first counts": Call(C.OK, body=framed(GOOD) * 2),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_call_ends(served: Served, name: str) -> None:
    bad = BAD[name]
    async with raw_call(served.address) as call:
        await call.send({":path": bad.path, **bad.headers}, bad.body)
        answer = await call.finish()
    assert answer.code is bad.code, answer
    assert bad.says in answer.headers.get("grpc-message", "")
    assert answer.reset == (bad.code is None)


UNFINISHED: dict[str, tuple[bytes, bool]] = {
    "no message": (b"", True),
    "no message yet": (b"", False),
    "half a message": (framed(GOOD)[:-3], False),
    "half a message, and the end": (framed(GOOD)[:-3], True),
}


@pytest.mark.parametrize("name", UNFINISHED)
async def test_a_call_without_a_message_takes_no_place(served: Served, name: str) -> None:
    """It is never answered, for gRPC waits for the message; it must not count as a call either."""
    body, end = UNFINISHED[name]
    async with raw_call(served.address) as call:
        await call.send({":path": GENERATE}, body, end=end)
        assert await call.settle() == Answer()
        assert served.server.num_calls == 0
        await served.check_well()


async def test_a_stream_that_is_reset_in_the_middle_frees_its_row(served: Served) -> None:
    async with raw_call(served.address) as call:
        await call.send({":path": STREAM}, framed(generation(**ENDLESS)))
        await call.first_byte()
        assert served.server.core.engine.running == 1
        await call.reset()
        await until(lambda: not served.server.core.engine.running)
        await served.check_well()


async def test_a_connection_cut_in_the_middle_of_a_stream_frees_its_row(served: Served) -> None:
    async with raw_call(served.address) as call:
        await call.send({":path": STREAM}, framed(generation(**ENDLESS)))
        await call.first_byte()
        assert served.server.core.engine.running == 1
    await until(lambda: not served.server.core.engine.running)


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


GARBAGE: dict[str, bytes] = {
    "HTTP/1.1": b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": client_hello(),
    "zeros": bytes(1000),
    "all bytes": bytes(range(256)) * 20,
    "a preface with a fault": PREFACE.replace(b"SM", b"MS"),
    "a frame of 16 MiB after the preface": PREFACE + b"\xff\xff\xff\x00" + bytes(5),
    "headers before settings": PREFACE + b"\x00\x00\x01\x01\x05\x00\x00\x00\x01\xff",
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_closes_the_connection(served: Served, name: str) -> None:
    await until_hung_up_on(served.address, GARBAGE[name])


async def test_half_open_connections_do_not_block_other_calls(served: Served) -> None:
    async with AsyncExitStack() as stack:
        for number in range(HALF_OPEN):
            call = await stack.enter_async_context(raw_call(served.address))
            whole = call.prepare({":path": GENERATE}, framed(GOOD), end=True)
            # Each falls silent at another place, the first before it has said anything.
            await call.write(whole[: len(whole) * number // HALF_OPEN])
        await served.check_well()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"", PREFACE[:10], PREFACE])
async def test_silent_connections_are_closed(served: Served, sent: bytes) -> None:
    await until_hung_up_on(served.address, sent)
