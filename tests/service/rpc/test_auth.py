"""Bearer tokens from a file, on both ports, for every method except health."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from structlog.testing import capture_logs

from a2sf.errors import InvalidArgument, Unauthenticated
from service.client import ChannelOptions, Client
from service.config import files
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.rpc import auth
from service.rpc.auth import TokenFile
from tests.service.conftest import WAIT_S, StartServer

TOKEN = "inference-token-0123456789"
SECOND = "another-inference-token-42"
ADMIN_TOKEN = "admin-token-0123456789-abc"
WRONG = "wrong-token-0123456789-xyz"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write(tmp_path / "tokens", f"# of the tests\n\n{TOKEN}\n  {SECOND}  \n")


@pytest.fixture
def admin_tokens(tmp_path: Path) -> Path:
    return write(tmp_path / "admin-tokens", f"{ADMIN_TOKEN}\n")


def write(path: Path, text: str) -> Path:
    # A new file each time, as editors and Kubernetes do it.
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.chmod(0o600)
    return temporary.replace(path)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def describe(channel: grpc.aio.Channel, metadata: Any = ()) -> pb.GetModelResponse:
    """One unary call that needs a token."""
    stub = pb_grpc.ModelServiceStub(channel)
    return await stub.GetModel(pb.GetModelRequest(), metadata=metadata, timeout=WAIT_S)


async def stream(channel: grpc.aio.Channel, metadata: Any = ()) -> list[Any]:
    """One streaming call that needs a token."""
    request = pb.StreamGenerateRequest()
    request.input.text = "x"
    request.input.max_new_tokens = 2
    call = pb_grpc.InferenceServiceStub(channel).StreamGenerate(
        request, metadata=metadata, timeout=WAIT_S
    )
    return [message async for message in call]


async def reflect(channel: grpc.aio.Channel, metadata: Any = ()) -> set[str]:
    """One call of two streams that needs a token."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(metadata=metadata, timeout=WAIT_S)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    call.cancel()
    return {service.name for service in answer.list_services_response.service}


async def unknown(channel: grpc.aio.Channel, metadata: Any = ()) -> bytes:
    """One call of a method that does not exist."""
    answer: bytes = await channel.unary_unary("/no.such.Service/Method")(
        b"", metadata=metadata, timeout=WAIT_S
    )
    return answer


async def load(channel: grpc.aio.Channel, metadata: Any = ()) -> pb.AbortRequestsResponse:
    """One call of the admin service."""
    stub = pb_grpc.AdminServiceStub(channel)
    request = pb.AbortRequestsRequest(request_ids=["nobody"])
    return await stub.AbortRequests(request, metadata=metadata, timeout=WAIT_S)


async def refusal(call: Any) -> str:
    """The message with which the call is refused, after a look at its details."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED, error
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("Unauthenticated", "a2sf.inference.v1")
    assert "token-0123" not in str(error)
    message = error.details()
    assert message is not None
    return message


@pytest.mark.parametrize("call", [describe, stream, reflect, unknown])
async def test_every_kind_of_call_is_refused_without_a_token(
    call: Callable[..., Any], start_server: StartServer, tokens: Path
) -> None:
    _, _, address = await start_server(token_file=tokens)
    async with grpc.aio.insecure_channel(address) as channel:
        assert "needs a bearer token" in await refusal(call(channel))
        assert "does not accept" in await refusal(call(channel, bearer(WRONG)))


async def test_a_stream_is_refused_before_its_first_message(
    start_server: StartServer, tokens: Path
) -> None:
    _, _, address = await start_server(token_file=tokens)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(timeout=WAIT_S)
        assert "needs a bearer token" in await refusal(call.read())


@pytest.mark.parametrize("token", [TOKEN, SECOND])
async def test_every_token_of_the_file_allows_every_kind_of_call(
    token: str, start_server: StartServer, tokens: Path
) -> None:
    _, _, address = await start_server(token_file=tokens)
    async with grpc.aio.insecure_channel(address) as channel:
        assert (await describe(channel, bearer(token))).max_batch == 2
        assert (await stream(channel, bearer(token)))[-1].HasField("finished")
        assert "a2sf.inference.v1.InferenceService" in await reflect(channel, bearer(token))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unknown(channel, bearer(token))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([TOKEN], "of the form"),
        ([f"Basic {TOKEN}"], "of the form"),
        (["Bearer"], "of the form"),
        (["Bearer "], "of the form"),
        ([""], "of the form"),
        ([f"Bearer {TOKEN}", f"Bearer {TOKEN}"], "of the form"),
        ([f"Bearer  {TOKEN}"], "does not accept"),
        ([f"Bearer {TOKEN[:-1]}"], "does not accept"),
        ([f"Bearer {TOKEN}x"], "does not accept"),
        ([f"Bearer {TOKEN.upper()}"], "does not accept"),
        (["Bearer # of the tests"], "does not accept"),
    ],
)
async def test_a_malformed_authorization_header_is_refused(
    values: list[str], message: str, start_server: StartServer, tokens: Path
) -> None:
    _, _, address = await start_server(token_file=tokens)
    metadata = tuple(("authorization", value) for value in values)
    async with grpc.aio.insecure_channel(address) as channel:
        assert message in await refusal(describe(channel, metadata))
        assert await describe(channel, (("authorization", f"bearer {TOKEN}"),))


async def test_health_needs_no_token(
    start_server: StartServer, tokens: Path, admin_tokens: Path
) -> None:
    server, _, address = await start_server(
        token_file=tokens, admin_port=0, admin_token_file=admin_tokens
    )
    for target in (address, server.admin_address):
        assert target is not None
        async with grpc.aio.insecure_channel(target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_large_and_small_requests_without_a_token_get_the_same_error(
    start_server: StartServer, tokens: Path
) -> None:
    _, _, address = await start_server(token_file=tokens)
    request = pb.TokenizeRequest(text="x" * 3 * 2**20)
    async with grpc.aio.insecure_channel(address) as channel:
        call = pb_grpc.InferenceServiceStub(channel).Tokenize(request, timeout=WAIT_S)
        assert "needs a bearer token" in await refusal(call)


async def test_each_port_has_separate_tokens_and_services(
    start_server: StartServer, tokens: Path, admin_tokens: Path
) -> None:
    server, _, address = await start_server(
        token_file=tokens, admin_port=0, admin_token_file=admin_tokens
    )
    assert server.admin_address is not None
    async with (
        grpc.aio.insecure_channel(address) as inference,
        grpc.aio.insecure_channel(server.admin_address) as admin,
    ):
        assert "does not accept" in await refusal(describe(inference, bearer(ADMIN_TOKEN)))
        assert "does not accept" in await refusal(load(admin, bearer(TOKEN)))
        assert "needs a bearer token" in await refusal(load(admin))
        assert list((await load(admin, bearer(ADMIN_TOKEN))).request_ids) == []
        for channel, token, call in (
            (inference, TOKEN, load),
            (admin, ADMIN_TOKEN, describe),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(channel, bearer(token))
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "a2sf.inference.v1.AdminService" not in await reflect(inference, bearer(TOKEN))
        assert await reflect(admin, bearer(ADMIN_TOKEN)) == {
            "a2sf.inference.v1.AdminService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }


async def test_a_changed_token_file_is_used_without_a_restart(
    start_server: StartServer, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CHECK_S", 0.0)
    _, _, address = await start_server(token_file=tokens)
    async with grpc.aio.insecure_channel(address) as channel:
        await describe(channel, bearer(TOKEN))
        write(tokens, WRONG)
        await refusal(describe(channel, bearer(TOKEN)))
        await describe(channel, bearer(WRONG))


@pytest.mark.parametrize("text", ["", "# none\n", "short\n", None])
def test_an_invalid_new_token_file_is_logged_once_and_changes_nothing(
    text: str | None, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CHECK_S", 0.0)
    file = TokenFile(tokens, "--token-file")
    if text is None:
        tokens.unlink()
    else:
        write(tokens, text)
    with capture_logs() as logs:
        assert file.accepts(TOKEN)
        assert not file.accepts(WRONG)
    assert [line["event"] for line in logs] == ["token file not taken, earlier tokens stay"]
    write(tokens, WRONG)
    assert file.accepts(WRONG)
    assert not file.accepts(TOKEN)


def test_the_token_file_is_checked_at_most_once_a_second(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(auth.time, "monotonic", lambda: now)
    file = TokenFile(tokens, "--token-file")
    write(tokens, WRONG)
    now += auth.CHECK_S / 2
    assert file.accepts(TOKEN)
    now += auth.CHECK_S
    assert file.accepts(WRONG)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no token"),
        ("# only a comment\n\n", "holds no token"),
        (f"{TOKEN}\nfifteen-letters\n", "line 2: not a token; accepted: 16 or more"),
        (f"{TOKEN} {SECOND}\n", "line 1: not a token"),
        ("a-tokén-with-an-accent\n", "line 1: not a token"),
        ("x" * (files.MAX_FILE_BYTES + 1), "larger than"),
    ],
)
def test_a_file_without_valid_tokens_fails_the_start(
    text: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "tokens", text)
    with pytest.raises(InvalidArgument, match=message) as caught:
        TokenFile(path, "--token-file")
    message = str(caught.value)
    assert message.startswith(f"--token-file: {path}")
    assert not any(line.strip() in message for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("kind", ["nothing", "a directory", "a pipe"])
def test_a_token_file_must_be_a_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    if kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    with pytest.raises(InvalidArgument, match=r"--token-file: .*/tokens"):
        TokenFile(path, "--token-file")


def test_a_token_file_that_others_can_read_causes_a_warning(tokens: Path) -> None:
    with capture_logs() as logs:
        TokenFile(tokens, "--token-file")
    assert logs == []
    tokens.chmod(0o644)
    with capture_logs() as logs:
        TokenFile(tokens, "--token-file")
    assert [line["event"] for line in logs] == ["token file can be read by other users"]


async def test_tokens_and_credentials_are_never_logged(
    start_server: StartServer, tokens: Path
) -> None:
    with capture_logs() as logs:
        _, _, address = await start_server(token_file=tokens)
        async with grpc.aio.insecure_channel(address) as channel:
            await refusal(describe(channel, bearer(WRONG)))
            await describe(channel, bearer(TOKEN))
        options = ChannelOptions(token=WRONG)
        async with Client(address, options) as client:
            with pytest.raises(Unauthenticated) as caught:
                await client.get_model()
    *refused, last = [line for line in logs if line["event"] == "call refused"]
    assert len(refused) == 1
    assert refused[0]["method"] == "/a2sf.inference.v1.ModelService/GetModel"
    assert caught.value.request_id == last["request_id"] != ""
    assert "token-0123" not in str(logs)


@pytest.mark.parametrize("insecure", [True, False])
async def test_tokens_in_plain_text_on_a_network_cause_a_warning(
    insecure: bool, start_server: StartServer, tokens: Path
) -> None:
    host = "0.0.0.0" if insecure else "127.0.0.1"
    with capture_logs() as logs:
        await start_server(token_file=tokens, host=host, insecure_bind=insecure)
    warned = [line for line in logs if line["event"] == "tokens cross the network in plain text"]
    assert len(warned) == insecure
