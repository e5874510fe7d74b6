"""What no gRPC client would send: HTTP/2 spelled out, protobuf by the byte, and plain garbage.

Owns one call over a separate connection, with any bytes, and the response. Knows nothing of
what the services mean.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    PingAckReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)

from tests.service.conftest import WAIT_S

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

VARINT, LENGTH_DELIMITED = 0, 2

STREAM_ID = 1

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def tagged(number: int, value: bytes | int) -> bytes:
    """Write one field of a message: a varint, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3 | VARINT) + varint(value)
    return varint(number << 3 | LENGTH_DELIMITED) + varint(len(value)) + value


def varint(value: int) -> bytes:
    """Write a number that is not negative, 7 bits a byte."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def framed(message: bytes, *, flags: int = 0, length: int | None = None) -> bytes:
    """Put gRPC's prefix before a message; `length` is what it claims where that is a lie."""
    return bytes([flags]) + (len(message) if length is None else length).to_bytes(4) + message


@dataclass
class Answer:
    """What came back."""

    headers: dict[str, str] = field(default_factory=dict)
    """Trailers included."""
    body: bytes = b""
    reset: bool = False
    """The stream or its connection was ended without a status."""

    @property
    def code(self) -> grpc.StatusCode | None:
        """The call's status, where there is one."""
        status = self.headers.get("grpc-status")
        return None if status is None else _CODES[int(status)]


class RawCall:
    """One call, spelled out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = H2Connection(
            H2Configuration(
                header_encoding="utf-8",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self._http.initiate_connection()
        self.answer = Answer()
        """As far as it has come."""
        self._over = False

    def prepare(
        self, headers: Mapping[str, str | bytes | None], body: bytes, *, end: bool
    ) -> bytes:
        """Return the bytes of the whole call, to be sent with `write`; None leaves a header out."""
        usual: dict[str, str | bytes | None] = {
            ":method": "POST",
            ":scheme": "http",
            ":authority": "test",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        pairs = {**usual, **headers}.items()
        # Pseudo-headers lead.
        ordered = sorted(pairs, key=lambda pair: not pair[0].startswith(":"))
        self._http.send_headers(STREAM_ID, [(k, v) for k, v in ordered if v is not None])
        self._http.send_data(STREAM_ID, body, end_stream=end)
        return self._http.data_to_send()

    async def send(
        self, headers: Mapping[str, str | bytes | None], body: bytes, *, end: bool = True
    ) -> None:
        """Send the call; its stream is left open unless this is its `end`."""
        await self.write(self.prepare(headers, body, end=end))

    async def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def reset(self) -> None:
        """Give the call up."""
        self._http.reset_stream(STREAM_ID)
        await self.write(self._http.data_to_send())

    async def finish(self) -> Answer:
        """Read until the call has ended."""
        await self._read(lambda _: self._over)
        return self.answer

    async def first_byte(self) -> None:
        """Read until some of the answer has come."""
        await self._read(lambda _: bool(self.answer.body))

    async def settle(self) -> Answer:
        """Read until the server has taken in all that was sent, and return what came by then."""
        self._http.ping(b"are you?")
        await self.write(self._http.data_to_send())
        await self._read(lambda events: any(isinstance(e, PingAckReceived) for e in events))
        return self.answer

    async def _read(self, until: Callable[[Iterable[object]], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            events: list[object] = []
            while not until(events) and not self._over:
                data = await self._reader.read(2**16)
                events = list(self._http.receive_data(data)) if data else []
                self._take(events)
                self._over |= not data
                await self.write(self._http.data_to_send())

    def _take(self, events: Iterable[object]) -> None:
        for event in events:
            match event:
                case ResponseReceived() | TrailersReceived():
                    self.answer.headers |= dict(event.headers)
                case DataReceived():
                    self.answer.body += event.data
                case StreamEnded():
                    self._over = True
                case StreamReset() | ConnectionTerminated():
                    self._over = self.answer.reset = True


@asynccontextmanager
async def raw_call(address: str) -> AsyncIterator[RawCall]:
    """Open a connection for one call; it is closed without ceremony at the end."""
    async with connection(address) as (reader, writer):
        yield RawCall(reader, writer)


@asynccontextmanager
async def connection(
    address: str,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a TCP connection; it is closed without ceremony at the end."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def until_hung_up_on(address: str, data: bytes) -> None:
    """Send `data`, and wait until the server closes the connection in answer to it."""
    async with connection(address) as (reader, writer), asyncio.timeout(WAIT_S):
        writer.write(data)
        with suppress(ConnectionResetError):
            await reader.read()
