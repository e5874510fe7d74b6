"""Callers without the right token or certificate are refused; other callers are served."""

from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme

from service.pb import inference_pb2 as pb
from tests.service.bad_inputs.conftest import GENERATE, GOOD, Served, read
from tests.service.conftest import WAIT_S, StartServer
from tests.service.wire import PREFACE, framed, raw_call, until_hung_up_on

TOKEN = "a-token-that-nobody-guesses"

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED

WRONG_TOKENS: dict[str, tuple[str, ...]] = {
    "none": (),
    "an empty one": ("",),
    "a scheme alone": ("Bearer",),
    "another scheme": (f"Basic {TOKEN}",),
    "no scheme": (TOKEN,),
    "another": ("Bearer another-token-of-theirs",),
    "a part of it": (f"Bearer {TOKEN[:-1]}",),
    "more than it": (f"Bearer {TOKEN}x",),
    "in capitals": (f"Bearer {TOKEN.upper()}",),
    "two, one of them right": (f"Bearer {TOKEN}", "Bearer another-token-of-theirs"),
    "a comment of the file": ("Bearer #-a-comment-in-the-file",),
    # Of all metadata together, gRPC itself refuses more than 8 KiB, by chance at first.
    "a long one": ("Bearer " + "t" * 4000,),
}


async def test_wrong_tokens_are_refused(start_server: StartServer, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"#-a-comment-in-the-file\n\n{TOKEN}\n")
    file.chmod(0o600)
    server, _, address = await start_server(token_file=file)
    async with grpc.aio.insecure_channel(address) as channel:
        served = Served(server, address, channel)
        for name, tokens in WRONG_TOKENS.items():
            status = read(
                await served.refusal(GOOD, metadata=[("authorization", token) for token in tokens])
            )
            assert status.code is UNAUTHENTICATED, name
            assert status.reason == "Unauthenticated", name
            assert not any(token[-10:] in status.details for token in tokens if token[10:]), name
            # The message of an unknown caller is not read.
            assert (await served.refusal(b"\xff")).code() is UNAUTHENTICATED
        await served.check_well(metadata=[("authorization", f"Bearer {TOKEN}")])


@pytest.mark.parametrize("value", [b"\xff\xfe", b"Bearer \xc3", b"Bearer \xed\xa0\x80", b"\x01"])
async def test_a_binary_token_is_refused(
    start_server: StartServer, tmp_path: Path, value: bytes
) -> None:
    file = tmp_path / "tokens"
    file.write_text(TOKEN)
    file.chmod(0o600)
    _, _, address = await start_server(token_file=file)
    async with raw_call(address) as call:
        await call.send({":path": GENERATE, "authorization": value}, framed(GOOD))
        answer = await call.finish()
    assert answer.code is UNAUTHENTICATED, answer


@dataclass(frozen=True)
class Papers:
    """The certificates that a client presents and trusts."""

    trusts: trustme.CA
    signed_by: trustme.CA | None

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        shown = self.signed_by.issue_cert("client") if self.signed_by is not None else None
        return grpc.ssl_channel_credentials(
            root_certificates=self.trusts.cert_pem.bytes(),
            private_key=shown.private_key_pem.bytes() if shown else None,
            certificate_chain=shown.cert_chain_pems[0].bytes() if shown else None,
        )


async def test_wrong_certificates_are_refused(start_server: StartServer, tmp_path: Path) -> None:
    ours, theirs = trustme.CA(), trustme.CA()
    certificate = ours.issue_cert("127.0.0.1")
    files = {name: tmp_path / name for name in ("tls_cert", "tls_key", "tls_client_ca")}
    certificate.cert_chain_pems[0].write_to_path(files["tls_cert"])
    certificate.private_key_pem.write_to_path(files["tls_key"])
    ours.cert_pem.write_to_path(files["tls_client_ca"])
    server, _, address = await start_server(**files)
    wrong = {
        "no certificate": grpc.aio.secure_channel(address, Papers(ours, None).credentials),
        "one of another authority": grpc.aio.secure_channel(
            address, Papers(ours, theirs).credentials
        ),
        "a client that trusts others": grpc.aio.secure_channel(
            address, Papers(theirs, ours).credentials
        ),
        "plain text": grpc.aio.insecure_channel(address),
    }
    for name, channel in wrong.items():
        async with channel:
            error = await Served(server, address, channel).refusal(GOOD)
            assert error.code() is grpc.StatusCode.UNAVAILABLE, name
    for garbage in (PREFACE, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", bytes(100)):
        await until_hung_up_on(address, garbage)
    async with grpc.aio.secure_channel(address, Papers(ours, ours).credentials) as channel:
        await Served(server, address, channel).check_well()


async def test_the_token_of_another_port_is_refused(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Each port accepts only its own tokens."""
    files = {name: tmp_path / name for name in ("token_file", "admin_token_file")}
    for name, file in files.items():
        file.write_text(f"{name}-{TOKEN}")
        file.chmod(0o600)
    server, _, address = await start_server(admin_port=0, **files)
    assert server.admin_address is not None
    load = "/a2sf.inference.v1.AdminService/GetLoad"

    async def code(where: str, name: str, method: str, request: bytes) -> grpc.StatusCode:
        async with grpc.aio.insecure_channel(where) as channel:
            call = channel.unary_unary(method)(
                request,
                timeout=WAIT_S,
                metadata=[("authorization", f"Bearer {name}-{TOKEN}")],
            )
            return await call.code()

    empty = pb.GetLoadRequest().SerializeToString()
    assert await code(address, "admin_token_file", GENERATE, GOOD) is UNAUTHENTICATED
    assert await code(server.admin_address, "token_file", load, empty) is UNAUTHENTICATED
    assert await code(address, "token_file", GENERATE, GOOD) is grpc.StatusCode.OK
    assert await code(server.admin_address, "admin_token_file", load, empty) is grpc.StatusCode.OK
