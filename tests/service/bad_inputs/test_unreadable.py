"""Undecodable requests get INVALID_ARGUMENT from every method of every service."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from service.pb import inference_pb2 as pb
from service.server import ADMIN_SERVICES
from tests.service.bad_inputs.conftest import Served, read
from tests.service.conftest import WAIT_S, StartServer
from tests.service.wire import tagged

TOKEN = "a-token-that-nobody-guesses"

METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in (pb.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}


def with_bad_text(method: MethodDescriptor) -> list[bytes]:
    """A request of each string field that the method has at its top, without being UTF-8."""
    strings = [one for one in method.input_type.fields if one.type == one.TYPE_STRING]
    return [tagged(one.number, b"\xff\xfe") for one in strings]


@pytest_asyncio.fixture
async def both_ports(
    start_server: StartServer, tmp_path: Path
) -> AsyncIterator[tuple[grpc.aio.Channel, grpc.aio.Channel]]:
    file = tmp_path / "tokens"
    file.write_text(TOKEN)
    file.chmod(0o600)
    server, _, address = await start_server(admin_port=0, admin_token_file=file)
    assert server.admin_address is not None
    async with (
        grpc.aio.insecure_channel(address) as everyone,
        grpc.aio.insecure_channel(server.admin_address) as operators,
    ):
        yield everyone, operators
        await Served(server, address, everyone).check_well()


async def test_no_method_returns_unknown_for_an_undecodable_request(
    both_ports: tuple[grpc.aio.Channel, grpc.aio.Channel],
) -> None:
    everyone, operators = both_ports
    token = [("authorization", f"Bearer {TOKEN}")]
    for path, method in METHODS.items():
        for request in (b"\x0a\x05cut", *with_bad_text(method)):
            for channel in (everyone, operators):
                ours = method.containing_service.full_name.startswith("a2sf")
                admin = method.containing_service.full_name in ADMIN_SERVICES
                if ours and admin is not (channel is operators):
                    continue
                # One message, and the first answer if there is one: so any method can be called.
                call = channel.unary_unary(path)(request, timeout=WAIT_S, metadata=token)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                status = read(caught.value)
                assert status.code is grpc.StatusCode.INVALID_ARGUMENT, (path, request, status)
                assert (status.reason, status.field) == ("InvalidArgument", "request"), (
                    path,
                    status,
                )
                assert f"message of {method.name} is truncated" in status.details
                assert "Error" not in status.details, "no exception of Python's, nor its class"


async def test_a_reflection_stream_is_answered_up_to_the_undecodable_message(
    both_ports: tuple[grpc.aio.Channel, grpc.aio.Channel],
) -> None:
    good = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    call = both_ports[0].stream_stream(path)([good, good, b"\x0a\x05cut", good], timeout=WAIT_S)
    assert await call.read()
    assert await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert read(caught.value).field == "request"


async def test_health_lists_every_service(
    both_ports: tuple[grpc.aio.Channel, grpc.aio.Channel],
) -> None:
    answer = await both_ports[0].unary_unary("/grpc.health.v1.Health/List")(b"", timeout=WAIT_S)
    statuses = health_pb2.HealthListResponse.FromString(answer).statuses
    serving = health_pb2.HealthCheckResponse.SERVING
    assert {one.status for one in statuses.values()} == {serving}
    assert set(statuses) >= {"", "a2sf.inference.v1.InferenceService"}
