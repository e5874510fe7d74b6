"""One request fails on a real server: its client gets the error, and no other request notices."""

import asyncio
from collections.abc import AsyncIterable, Awaitable
from pathlib import Path

import grpc
import pytest
from structlog.testing import capture_logs

from a2sf.errors import NonFinite, NotFound
from a2sf.text.detokenizer import TextStream
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.rpc.lifecycle import call_scope
from service.server import Server
from service.status import RemoteError
from tests.service.conftest import StartServer, until
from tests.tiny import save_poisoned_llama

POISON = 250

STOP = "the victim's"


class Panic(BaseException):
    """Like what tokenizers raises where its Rust code panics: no Exception."""


def completion(text: str = "hello there", **fields: object) -> pb.GenerationInput:
    settings: dict[str, object] = {
        "max_new_tokens": 25,
        "ignore_eos": True,
        "sampling": pb.Sampling(temperature=0.0),
        **fields,
    }
    if "token_ids" not in settings:
        settings["text"] = text
    return pb.GenerationInput(**settings)  # type: ignore[arg-type]


async def text_of(stub: pb_grpc.InferenceServiceStub, message: pb.GenerationInput) -> str:
    events = stub.StreamGenerate(pb.StreamGenerateRequest(input=message), timeout=60)
    text, last = "", None
    async for event in events:
        text += event.delta.text
        last = event.WhichOneof("event")
    assert last == "finished"
    return text


async def to_the_end(events: AsyncIterable[pb.StreamGenerateResponse]) -> None:
    async for _ in events:
        pass


async def check_internal_error(call: Awaitable[object]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert failed.value.details() == "internal error; request id the-victim"


async def check_alone(server: Server, address: str, victim: pb.GenerationInput) -> list[dict]:  # type: ignore[type-arg]
    """The victim's call ends as INTERNAL by its id; neighbours and successors are served.

    Returns the lines that were logged of the victim with a traceback.
    """
    victim.request_id = "the-victim"
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        neighbour = completion(max_new_tokens=60)
        want = await text_of(stub, neighbour)
        with capture_logs() as lines:
            reading = asyncio.create_task(text_of(stub, neighbour))
            streaming = stub.StreamGenerate(pb.StreamGenerateRequest(input=victim), timeout=60)
            await check_internal_error(to_the_end(streaming))
            await check_internal_error(stub.Generate(pb.GenerateRequest(input=victim), timeout=60))
            assert await reading == want
        assert not server.crashed.done()
        assert await text_of(stub, neighbour) == want
    backend = server._backend
    await until(lambda: backend.load.admitted == 0)
    load = backend.load
    assert (load.running, load.waiting, load.kv_bytes_used) == (0, 0, 0)
    assert backend.metrics.registry.get_sample_value("a2sf_completions_failed_total") == 2
    return [line for line in lines if line.get("exc_info")]


async def test_a_decoding_error_ends_only_its_stream(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = TextStream.push

    def broken(text: TextStream, token: int) -> str:
        if STOP in text._stop:
            raise Panic("a secret of the house")
        return push(text, token)

    server, _, address = await start_server()
    monkeypatch.setattr(TextStream, "push", broken)
    lines = await check_alone(server, address, completion(stop=[STOP]))
    # Once for each call.
    assert [(line["event"], line["request_id"]) for line in lines] == [
        ("request failed", "the-victim")
    ] * 2
    assert all(isinstance(line["exc_info"], Panic) for line in lines)


async def test_a_panic_at_submission_fails_only_that_request(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = TextStream.__init__

    def broken(text: TextStream, tokenizer: object, prompt: object, stop: object, *_: int) -> None:
        if STOP in stop:  # type: ignore[operator]
            raise Panic
        init(text, tokenizer, prompt, stop, *_)  # type: ignore[arg-type]

    server, _, address = await start_server()
    monkeypatch.setattr(TextStream, "__init__", broken)
    await check_alone(server, address, completion(stop=[STOP]))


async def test_non_finite_logits_end_only_their_stream(
    start_server: StartServer, tmp_path: Path
) -> None:
    save_poisoned_llama(tmp_path, POISON)
    server, _, address = await start_server(model=str(tmp_path))
    victim = completion(token_ids=pb.TokenIds(ids=[5, 6, POISON, 7]))
    lines = await check_alone(server, address, victim)
    assert [(line["event"], line["request_id"]) for line in lines] == [
        ("request failed", "the-victim")
    ] * 2
    assert all("non-finite logits" in line["reason"] for line in lines)


async def test_a_model_with_only_non_finite_logits_does_not_start(
    start_server: StartServer, tmp_path: Path
) -> None:
    save_poisoned_llama(tmp_path, 0)
    with pytest.raises(NonFinite, match=r"non-finite logits.*bfloat16 or float32 helps"):
        await start_server(model=str(tmp_path))


async def test_a_panic_while_reading_a_prompt_fails_only_that_call(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client, _ = await start_server()

    def broken(*_: object, **__: object) -> None:
        raise Panic

    with monkeypatch.context() as patch:
        patch.setattr(type(server.core.model), "encode", broken)
        with pytest.raises(RemoteError, match="INTERNAL: internal error; request id"):
            await client.generate("hello", max_new_tokens=3)
    assert (await client.generate("hello", max_new_tokens=3)).finished


class BrokenConnection:
    """The context of a call whose client is gone before the status of its call is sent."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, *_: object) -> None:
        raise grpc.aio.InternalError("Failed to execute a batch")


async def test_a_client_that_leaves_before_its_status_ends_the_call_quietly(
    start_server: StartServer,
) -> None:
    server, _, _ = await start_server()
    with capture_logs() as lines, pytest.raises(asyncio.CancelledError):
        async with call_scope("GetModel", server._backend, BrokenConnection()):  # type: ignore[arg-type]
            raise NotFound("no such thing")
    assert [(one["event"], one["outcome"]) for one in lines] == [("answered", "NOT_FOUND")]
