"""TLS: listening, client certificates, and certificates that change while the server runs."""

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from structlog.testing import capture_logs

from a2sf.errors import InvalidArgument
from service.config.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.rpc.tls import server_credentials
from service.server import Server
from tests.service.conftest import WAIT_S, StartServer
from tests.service.rpc.test_auth import ADMIN_TOKEN, TOKEN, bearer, describe, write


@dataclass(frozen=True)
class Place:
    """A directory with a server's certificate and key, and the authorities of both sides."""

    directory: Path
    server_ca: trustme.CA
    client_ca: trustme.CA

    @property
    def cert(self) -> Path:
        return self.directory / "server.pem"

    @property
    def key(self) -> Path:
        return self.directory / "server.key"

    @property
    def trusted_clients(self) -> Path:
        return self.directory / "clients.pem"

    def issue(self, ca: trustme.CA | None = None) -> trustme.LeafCert:
        """Put a new certificate and key in their places."""
        leaf = (ca or self.server_ca).issue_cert("127.0.0.1", "server.example")
        write(self.cert, "".join(pem.bytes().decode() for pem in leaf.cert_chain_pems))
        write(self.key, leaf.private_key_pem.bytes().decode())
        return leaf

    def channel(
        self,
        address: str,
        *,
        ca: trustme.CA | None = None,
        client: trustme.LeafCert | None = None,
    ) -> grpc.aio.Channel:
        """A client that trusts `ca` and shows `client`."""
        credentials = grpc.ssl_channel_credentials(
            (ca or self.server_ca).cert_pem.bytes(),
            client.private_key_pem.bytes() if client else None,
            b"".join(pem.bytes() for pem in client.cert_chain_pems) if client else None,
        )
        # Otherwise a later channel might go over an earlier one's connection.
        return grpc.aio.secure_channel(
            address, credentials, [("grpc.use_local_subchannel_pool", 1)]
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path, trustme.CA(), trustme.CA())
    place.issue()
    place.client_ca.cert_pem.write_to_path(place.trusted_clients)
    return place


async def refused(channel: grpc.aio.Channel) -> str:
    """Why no connection comes about."""
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await describe(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        return caught.value.details() or ""


async def answered(channel: grpc.aio.Channel) -> None:
    async with channel:
        assert (await describe(channel)).max_batch == 2


async def test_only_clients_that_trust_the_certificate_can_call(
    start_server: StartServer, place: Place
) -> None:
    _, _, address = await start_server(tls_cert=place.cert, tls_key=place.key)
    await answered(place.channel(address))
    assert "CERTIFICATE_VERIFY_FAILED" in await refused(place.channel(address, ca=trustme.CA()))
    await refused(grpc.aio.insecure_channel(address))


async def test_with_a_client_ca_every_client_needs_a_certificate(
    start_server: StartServer, place: Place
) -> None:
    _, _, address = await start_server(
        tls_cert=place.cert, tls_key=place.key, tls_client_ca=place.trusted_clients
    )
    right = place.client_ca.issue_cert("operator@example.com")
    await answered(place.channel(address, client=right))
    await refused(place.channel(address))
    for wrong in (trustme.CA(), place.server_ca):
        await refused(place.channel(address, client=wrong.issue_cert("operator@example.com")))


async def test_tokens_and_the_admin_port_use_tls_too(
    start_server: StartServer, place: Place
) -> None:
    server, _, address = await start_server(
        tls_cert=place.cert,
        tls_key=place.key,
        token_file=write(place.directory / "tokens", TOKEN),
        admin_port=0,
        admin_token_file=write(place.directory / "admin-tokens", ADMIN_TOKEN),
    )
    admin = server.admin_address
    assert admin is not None
    request = pb.AbortRequestsRequest(all=True)
    async with place.channel(address) as channel:
        assert await describe(channel, bearer(TOKEN))
    async with place.channel(admin) as channel:
        stub = pb_grpc.AdminServiceStub(channel)
        await stub.AbortRequests(request, metadata=bearer(ADMIN_TOKEN), timeout=WAIT_S)
    async with grpc.aio.insecure_channel(admin) as channel:
        stub = pb_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.AbortRequests(request, metadata=bearer(ADMIN_TOKEN), timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_renewed_certificate_is_used_on_every_port_without_a_restart(
    start_server: StartServer, place: Place
) -> None:
    server, _, address = await start_server(
        tls_cert=place.cert,
        tls_key=place.key,
        admin_port=0,
        admin_token_file=write(place.directory / "admin-tokens", ADMIN_TOKEN),
    )
    assert server.admin_address is not None
    other = trustme.CA()
    async with place.channel(address) as before:
        await describe(before)
        place.issue(other)
        for target in (address, server.admin_address):
            async with place.channel(target, ca=other) as channel:
                await asyncio.wait_for(channel.channel_ready(), WAIT_S)
            assert "VERIFY_FAILED" in await refused(place.channel(target))
        # Connections that stand are not cut.
        await describe(before)


async def test_a_renewed_client_ca_is_used_without_a_restart(
    start_server: StartServer, place: Place
) -> None:
    _, _, address = await start_server(
        tls_cert=place.cert, tls_key=place.key, tls_client_ca=place.trusted_clients
    )
    old, other = place.client_ca.issue_cert("a@example.com"), trustme.CA()
    await answered(place.channel(address, client=old))
    write(place.trusted_clients, other.cert_pem.bytes().decode())
    await answered(place.channel(address, client=other.issue_cert("b@example.com")))
    await refused(place.channel(address, client=old))


@pytest.mark.parametrize("what", ["half renewed", "damaged", "gone"])
async def test_invalid_new_certificate_files_change_nothing(
    what: str, start_server: StartServer, place: Place
) -> None:
    _, _, address = await start_server(tls_cert=place.cert, tls_key=place.key)
    other = trustme.CA()
    with capture_logs() as logs:
        if what == "half renewed":
            leaf = other.issue_cert("127.0.0.1")
            write(place.cert, leaf.cert_chain_pems[0].bytes().decode())
        elif what == "damaged":
            write(place.cert, place.cert.read_text()[:200])
        else:
            place.key.unlink()
        await answered(place.channel(address))
        await answered(place.channel(address))
    message = [
        line for line in logs if line["event"] == "certificates not taken, earlier ones stay"
    ]
    assert len(message) == 1
    assert "--tls-" in message[0]["reason"]
    place.issue(other)
    await answered(place.channel(address, ca=other))


def encrypted_key() -> bytes:
    key = serialization.load_pem_private_key(
        trustme.CA().issue_cert("127.0.0.1").private_key_pem.bytes(), None
    )
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"server.key": trustme.CA().issue_cert("a").private_key_pem.bytes()}, "is not the key of"),
        ({"server.key": encrypted_key()}, "without a passphrase"),
        ({"server.key": b"no key"}, r"server\.key: .*accepted: PEM files"),
        ({"server.pem": b""}, r"--tls-cert: .*server\.pem"),
        ({"server.pem": None}, r"--tls-cert: .*server\.pem: No such file"),
        ({"server.key": None}, r"--tls-key: .*server\.key: No such file"),
        ({"clients.pem": None}, r"--tls-client-ca: .*clients\.pem: No such file"),
        ({"clients.pem": b"nobody"}, r"--tls-client-ca: .*clients\.pem: .*accepted: a PEM file"),
    ],
    ids=[
        *("another's key", "passphrase", "no key", "empty certificate"),
        *("certificate missing", "key missing", "authority missing", "no authority"),
    ],
)
def test_unusable_certificate_files_fail_the_start(
    files: dict[str, bytes | None], message: str, place: Place
) -> None:
    for name, content in files.items():
        (place.directory / name).unlink()
        if content is not None:
            (place.directory / name).write_bytes(content)
    options = ServerOptions(
        tls_cert=place.cert, tls_key=place.key, tls_client_ca=place.trusted_clients
    )
    with pytest.raises(InvalidArgument, match=message):
        server_credentials(options)


def test_with_tls_the_server_may_listen_on_all_addresses(place: Place) -> None:
    options = ServerOptions(
        host="0.0.0.0",
        tls_cert=place.cert,
        tls_key=place.key,
        admin_host="0.0.0.0",
        admin_port=1,
        admin_token_file=place.directory / "tokens",
        metrics_host="0.0.0.0",
        metrics_port=1,
    )
    assert options.address == "0.0.0.0:50051"
    assert options.admin_address == "0.0.0.0:1"
    # Metrics have no TLS.
    with pytest.raises(InvalidArgument, match=r"--metrics-host: .*--insecure-bind"):
        _ = options.metrics_address
    plain = options.model_copy(update={"tls_cert": None, "tls_key": None})
    with pytest.raises(InvalidArgument, match=r"--admin-host: .*--tls-cert"):
        _ = plain.admin_address


async def test_no_port_is_opened_if_one_address_is_refused(place: Place) -> None:
    server = Server(ServerOptions(port=0, metrics_port=0, metrics_host="0.0.0.0"))
    with pytest.raises(InvalidArgument, match="--metrics-host"):
        await server.bind()
    assert server.metrics_url is None
    await server.stop()


async def probe(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service.health", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
    )
    output, _ = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_the_health_probe_works_over_tls_with_a_certificate(
    start_server: StartServer, place: Place
) -> None:
    _, _, address = await start_server(
        tls_cert=place.cert, tls_key=place.key, tls_client_ca=place.trusted_clients
    )
    ca, cert, key = (place.directory / name for name in ("ca.pem", "probe.pem", "probe.key"))
    place.server_ca.cert_pem.write_to_path(ca)
    leaf = place.client_ca.issue_cert("probe@example.com")
    leaf.cert_chain_pems[0].write_to_path(cert)
    leaf.private_key_pem.write_to_path(key)
    whole = (
        "--target",
        address,
        "--tls-ca",
        str(ca),
        "--tls-cert",
        str(cert),
        "--tls-key",
        str(key),
    )
    assert await probe(*whole) == (0, f"{address}: SERVING\n")
    assert await probe(*whole, "--server-name", "server.example") == (0, f"{address}: SERVING\n")
    assert await probe(*whole, "--server-name", "another.example") == (
        1,
        f"{address}: UNAVAILABLE\n",
    )
    assert await probe("--target", address) == (1, f"{address}: UNAVAILABLE\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tls-cert", "c"], "error: give both --tls-cert and --tls-key"),
        (
            ["--tls-cert", "c", "--tls-key", "k"],
            "error: --tls-cert, --tls-key and --server-name need --tls-ca",
        ),
        (["--tls-ca", "/no/such.pem"], "error: /no/such.pem: No such file or directory"),
    ],
)
async def test_a_probe_with_wrong_options_gives_the_reason(
    arguments: list[str], message: str
) -> None:
    code, output = await probe(*arguments)
    assert code == 2
    assert output.startswith(message)
