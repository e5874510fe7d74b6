"""Channels: targets, where a token may go, which certificates are used, and what is balanced."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health, health_pb2

from a2sf.errors import InvalidArgument, Unavailable
from service.client import (
    AdminClient,
    ChannelOptions,
    Client,
    SyncAdminClient,
    SyncClient,
    Tls,
)
from service.client.channel import INFERENCE, PLAIN_TEXT, uri
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from tests.service.conftest import WAIT_S

TOKEN = "correct-horse-battery-staple"

HERE = [
    "127.0.0.1:50051",
    "[::1]:50051",
    "localhost:50051",
    "dns:///localhost:50051",
    "ipv4:127.0.0.1:1,127.0.0.2:2",
    "127.0.0.1:1,127.0.0.2:2",
    "[::1]:1,[::1]:2",
    "ipv6:[::1]:1",
    "unix:/run/a2sf.sock",
    "unix-abstract:a2sf",
]
ELSEWHERE = [
    "10.0.0.7:50051",
    "a2sf.example:50051",
    "localhost.example:50051",
    "dns:///a2sf:50051",
    "dns://127.0.0.1/a2sf:50051",
    "ipv4:127.0.0.1:1,10.0.0.7:2",
    "127.0.0.1:1,10.0.0.7:2",
    "xds:///localhost",
    "a2sf",
]


@pytest.mark.parametrize("target", HERE)
def test_a_token_may_go_to_this_machine_in_plain_text(target: str) -> None:
    sent = ChannelOptions(token=TOKEN).metadata(target)
    assert sent == (("authorization", f"Bearer {TOKEN}"),)


@pytest.mark.parametrize("target", ELSEWHERE)
def test_a_token_leaves_this_machine_only_with_tls_or_insecure_token(target: str) -> None:
    with pytest.raises(InvalidArgument, match="plain text") as caught:
        ChannelOptions(token=TOKEN).metadata(target)
    assert TOKEN not in str(caught.value)
    assert ChannelOptions(token=TOKEN, tls=Tls()).metadata(target)
    assert ChannelOptions(token=TOKEN, insecure_token=True).metadata(target)
    assert not PLAIN_TEXT.metadata(target)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "naïve"])
def test_a_token_that_a_header_cannot_hold_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgument, match="token") as caught:
        ChannelOptions(token=token).metadata("127.0.0.1:1")
    assert not token or token not in str(caught.value)


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(ChannelOptions(token=TOKEN))
    with pytest.raises(ValueError) as caught:
        ChannelOptions(token=TOKEN.encode())  # type: ignore[arg-type]
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "several"),
    [
        ("127.0.0.1:50051", False),
        ("localhost:50051", False),
        ("unix:/run/a2sf.sock", False),
        ("a2sf:50051", True),
        ("dns:///a2sf:50051", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("127.0.0.1:1,127.0.0.1:2", True),
    ],
)
def test_targets_with_several_addresses_are_balanced_by_health(target: str, several: bool) -> None:
    def configured(balanced: bool) -> Any:
        settings = dict(PLAIN_TEXT.settings(target, balanced=balanced))
        return json.loads(settings.get("grpc.service_config", "{}"))

    config = configured(balanced=True)
    assert ("loadBalancingConfig" in config) == several
    assert ("healthCheckConfig" in config) == several


@pytest.mark.parametrize("client", [AdminClient, SyncAdminClient])
def test_an_admin_client_accepts_only_one_server(client: type[SyncAdminClient]) -> None:
    # The admin port does not report the health of the inference service: balanced, it would be
    # taken for one that never serves.
    settings = dict(PLAIN_TEXT.settings("dns:///a2sf:50052", balanced=False))
    assert "grpc.service_config" not in settings
    with pytest.raises(InvalidArgument, match="create one admin client for each"):
        client("127.0.0.1:1,127.0.0.1:2")


def test_a_list_with_tls_needs_a_server_name() -> None:
    with pytest.raises(InvalidArgument, match=r"tls\.server_name: missing, .* has no name"):
        SyncClient("10.0.0.7:1,10.0.0.8:1", ChannelOptions(tls=Tls()))
    with SyncClient("10.0.0.7:1,10.0.0.8:1", ChannelOptions(tls=Tls(server_name="a2sf.example"))):
        pass


def test_unusable_certificate_files_are_named(tmp_path: Path) -> None:
    ca, other = trustme.CA(), trustme.CA()
    cert, key, roots, riddle = (tmp_path / n for n in ("cert", "key", "roots", "riddle"))
    ca.issue_cert("client").cert_chain_pems[0].write_to_path(cert)
    other.issue_cert("client").private_key_pem.write_to_path(key)
    ca.cert_pem.write_to_path(roots)
    riddle.write_bytes(b"\xff not PEM")
    for tls, message in [
        (Tls(root_ca=tmp_path / "none"), "none: No such file"),
        (Tls(root_ca=riddle), "riddle: accepted: PEM, certificates$"),
        (Tls(cert=cert), "both cert and key"),
        (Tls(cert=cert, key=key), "key that is the certificate's"),
        (Tls(cert=cert, key=tmp_path / "none"), "No such file"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            tls.credentials()
    assert Tls(root_ca=roots).credentials()


class Model(pb_grpc.ModelServiceServicer):
    """Tells the name that it was given, and keeps what it was sent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.metadata: list[dict[str, Any]] = []

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelResponse:
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.metadata[-1]["peer"] = (context.auth_context() or {}).get("x509_common_name")
        return pb.GetModelResponse(
            server_version=self.name, model=pb.ModelIdentity(id="m", **SHAPE), head_dim=1
        )

    ListAlphaTables: Any = None
    GetAlphaTable: Any = None


SHAPE: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "num_layers": 1,
    "num_attention_heads": 1,
    "num_kv_heads": 1,
    "fingerprint": "0" * 64,
}


@asynccontextmanager
async def serving(
    model: Model, credentials: grpc.ServerCredentials | None = None, *handlers: Any
) -> AsyncIterator[int]:
    server = grpc.aio.server()
    pb_grpc.add_ModelServiceServicer_to_server(model, server)
    server.add_generic_rpc_handlers(handlers)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def test_both_clients_speak_tls_both_ways_and_send_the_token(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    server, mine = ca.issue_cert("a2sf.example"), ca.issue_cert("127.0.0.1", common_name="me")
    mine.private_key_pem.write_to_path(tmp_path / "key.pem")
    mine.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    credentials = grpc.ssl_server_credentials(
        [(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())],
        root_certificates=ca.cert_pem.bytes(),
        require_client_auth=True,
    )
    tls = Tls(
        root_ca=tmp_path / "ca.pem",
        cert=tmp_path / "cert.pem",
        key=tmp_path / "key.pem",
        server_name="a2sf.example",
    )
    model = Model("encrypted")
    async with serving(model, credentials) as port:
        target = f"127.0.0.1:{port}"
        options = ChannelOptions(token=TOKEN, tls=tls)
        async with Client(target, options) as client:
            assert (await client.get_model()).server_version == "encrypted"
        with SyncClient(target, options) as blocking:
            described = await asyncio.to_thread(blocking.get_model)
        assert described.server_version == "encrypted"
        for sent in model.metadata:
            assert sent["authorization"] == f"Bearer {TOKEN}"
            assert sent["peer"] == [b"me"]
        wrong_name = tls.model_copy(update={"server_name": "other.example"})
        async with Client(target, ChannelOptions(tls=wrong_name)) as client:
            with pytest.raises(Unavailable):
                await client.get_model(timeout_s=WAIT_S)
        async with Client(target) as client:
            with pytest.raises(Unavailable):
                await client.get_model(timeout_s=WAIT_S)
    assert len(model.metadata) == 2


UP = health_pb2.HealthCheckResponse.SERVING
DOWN = health_pb2.HealthCheckResponse.NOT_SERVING


async def with_health(status: int) -> Any:
    servicer = health.aio.HealthServicer()
    await servicer.set(INFERENCE, status)
    return grpc.method_handlers_generic_handler(
        "grpc.health.v1.Health",
        {
            "Watch": grpc.unary_stream_rpc_method_handler(
                servicer.Watch,
                request_deserializer=health_pb2.HealthCheckRequest.FromString,
                response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
            )
        },
    )


async def test_servers_of_a_list_share_one_name_over_tls(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    options = ChannelOptions(
        token=TOKEN, tls=Tls(root_ca=tmp_path / "ca.pem", server_name="a2sf.example")
    )

    def bearing(name: str) -> grpc.ServerCredentials:
        cert = ca.issue_cert(name)
        return grpc.ssl_server_credentials(
            [(cert.private_key_pem.bytes(), cert.cert_chain_pems[0].bytes())]
        )

    async with (
        serving(Model("a"), bearing("a2sf.example"), await with_health(UP)) as a,
        serving(Model("b"), bearing("a2sf.example"), await with_health(UP)) as b,
        serving(Model("c"), bearing("other.example"), await with_health(UP)) as c,
        Client(f"127.0.0.1:{a},127.0.0.1:{b},127.0.0.1:{c}", options) as client,
        asyncio.timeout(WAIT_S),
    ):
        seen: list[str] = []
        while not {"a", "b"} <= set(seen) or len(seen) < 20:
            seen.append((await client.get_model()).server_version)
    assert "c" not in seen


async def test_several_addresses_take_turns_and_servers_not_serving_are_skipped() -> None:
    async with (
        serving(Model("a"), None, await with_health(UP)) as a,
        serving(Model("b"), None, await with_health(UP)) as b,
        serving(Model("c"), None, await with_health(DOWN)) as c,
        Client(f"127.0.0.1:{a},127.0.0.1:{b},127.0.0.1:{c}") as client,
        asyncio.timeout(WAIT_S),
    ):
        seen: list[str] = []
        while not {"a", "b"} <= set(seen) or len(seen) < 20:
            seen.append((await client.get_model()).server_version)
    assert "c" not in seen


@pytest.mark.parametrize(
    ("target", "taken"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("a2sf.example:50051", "a2sf.example:50051"),
        ("dns:///a2sf:50051", "dns:///a2sf:50051"),
        ("10.0.0.7:1,10.0.0.8:2", "ipv4:10.0.0.7:1,10.0.0.8:2"),
        ("ipv4:10.0.0.7:1,10.0.0.8:2", "ipv4:10.0.0.7:1,10.0.0.8:2"),
        ("[fd00::7]:1,[fd00::8]:2", "ipv6:[fd00::7]:1,[fd00::8]:2"),
        ("ipv6:[fd00::7]:1,[fd00::8]:2", "ipv6:[fd00::7]:1,[fd00::8]:2"),
    ],
)
def test_a_list_is_converted_to_grpc_syntax(target: str, taken: str) -> None:
    assert uri(target) == taken


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("a2sf-1:50051,a2sf-2:50051", "'a2sf-1:50051' in a list; .* dns:///NAME:PORT"),
        ("localhost:1,localhost:2", "'localhost:1' in a list"),
        ("10.0.0.7,10.0.0.8:1", "'10.0.0.7' in a list"),
        ("10.0.0.7:1,", "'' in a list"),
        ("10.0.0.7:1, 10.0.0.8:1", "' 10.0.0.8:1' in a list"),
        ("10.0.0.7:1,10.0.0.8:0", "'10.0.0.8:0' in a list"),
        ("10.0.0.7:1,10.0.0.8:65536", "'10.0.0.8:65536' in a list"),
        ("fd00::7:1,[fd00::8]:1", "'fd00::7:1' in a list"),
        ("ipv4:10.0.0.7:1,a2sf:1", "'a2sf:1' in a list"),
        ("10.0.0.7:1,[fd00::8]:1", "mixes IPv4 and IPv6"),
    ],
)
def test_an_invalid_list_is_refused_by_name(target: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        uri(target)
