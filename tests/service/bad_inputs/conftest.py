"""One server for many bad inputs; after each, its state must be unchanged."""

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2

from service.backend.loading import Core, load_core
from service.config.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.server import Server
from service.status import DETAILS_KEY
from tests.service.conftest import WAIT_S, until

REFUSAL_S = 10.0
"""However large a request is, saying no to it takes less."""

MAX_TRAILER_BYTES = 8192
"""What gRPC's clients take; of more they would see none."""

INFERENCE = "/a2sf.inference.v1.InferenceService/"
GENERATE, STREAM = INFERENCE + "Generate", INFERENCE + "StreamGenerate"

MAX_MESSAGE_BYTES, MAX_PROMPT_BYTES = 3 * 2**20, 4096
SLOTS, CONTEXT, VOCABULARY = 64, 10**6, 258

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'ghost' %}{{ raise_exception(m.content) }}{% endif %}{% endfor %}"
)


def generation(**fields: Any) -> bytes:
    return pb.GenerateRequest(input=input_of(**fields)).SerializeToString()


def input_of(**fields: Any) -> pb.GenerationInput:
    prompt = {} if fields.keys() & {"text", "token_ids", "chat"} else {"text": "x"}
    return pb.GenerationInput(**{"max_new_tokens": 4, **prompt, **fields})


GOOD = generation()


@dataclass(frozen=True)
class Told:
    """What a refusal says."""

    code: grpc.StatusCode
    details: str
    reason: str | None
    """None where gRPC itself answers, before any code of ours."""
    fields: tuple[str, ...]
    """Of the violations."""

    @property
    def field(self) -> str | None:
        """Of the first one."""
        return self.fields[0] if self.fields else None


def read(error: grpc.aio.AioRpcError) -> Told:
    trailers = dict(error.trailing_metadata() or ())
    spelled = len((error.details() or "").encode()) * 3
    assert spelled + sum(map(len, trailers.values())) < MAX_TRAILER_BYTES
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(trailers.get(DETAILS_KEY, b"")).details:
        for kind in (info, bad):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(kind)
    fields = tuple(violation.field for violation in bad.field_violations)
    return Told(error.code(), error.details() or "", info.reason or None, fields)


@dataclass(frozen=True)
class Served:
    server: Server
    address: str
    channel: grpc.aio.Channel

    async def call(self, request: bytes, method: str = GENERATE, **options: Any) -> bytes:
        call = self.channel.unary_unary(method)(request, **{"timeout": REFUSAL_S, **options})
        return bytes(await call)

    async def refusal(
        self, request: bytes, method: str = GENERATE, **options: Any
    ) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(request, method, **options)
        return caught.value

    async def start(self, message: pb.GenerationInput) -> pb.GenerationStarted:
        """Have a completion started, and leave it."""
        stream = self.channel.unary_stream(STREAM)(
            pb.StreamGenerateRequest(input=message).SerializeToString(), timeout=WAIT_S
        )
        first = pb.StreamGenerateResponse.FromString(await stream.read())
        stream.cancel()
        return first.started

    async def check_well(self, **options: Any) -> None:
        """See that nothing is left of what was before, and that a good request works."""
        engine = self.server.core.engine
        await until(lambda: not (self.server.num_calls or engine.running or engine.waiting))
        answer = pb.GenerateResponse.FromString(await self.call(GOOD, timeout=WAIT_S, **options))
        assert answer.finished.usage.completion_tokens


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_server(
    long_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    tables = tmp_path_factory.mktemp("tables")
    (tables / "broken.json").write_text("{")
    # More than a client takes in one answer, were it repeated in what is wrong with the file.
    (tables / "long.json").write_text(json.dumps({"schema_version": 2, "sha256": "0" * 5 * 2**20}))
    (tables / os.fsdecode(b"no-text-\xff.json")).write_text("{")
    options = ServerOptions(
        model=str(long_model_dir),
        port=0,
        device="cpu",
        slots=SLOTS,
        default_budget=32,
        max_batch=2,
        tables=tables,
        max_message_bytes=MAX_MESSAGE_BYTES,
        max_prompt_bytes=MAX_PROMPT_BYTES,
    )

    def load(options: ServerOptions) -> Core:
        core = load_core(options)
        core.model.tokenizer.chat_template = TEMPLATE
        return core

    server = Server(options, load)
    address = f"127.0.0.1:{await server.bind()}"
    await server.warm()
    unlimited = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=unlimited) as channel:
        yield Served(server, address, channel)
    await server.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def served(one_server: Served) -> AsyncIterator[Served]:
    """One server for all cases; after each it must be as if there had been none."""
    yield one_server
    await one_server.check_well()
