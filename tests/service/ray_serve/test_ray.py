"""The application under a real Ray: two replicas on this machine, started as a user starts them.

One Ray serves all tests here, in their order: the last two take a replica away, and then all.
"""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from a2sf.errors import A2SFError, Unavailable
from a2sf.model.loader import load_model
from a2sf.requests import Delta, Finished, Sampling
from a2sf.tablefile import save_table
from service.client import Client
from service.config.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.server import Server
from service.status import DETAILS_KEY
from tests.tables import make_table

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

START_TIMEOUT_S = 300.0
WAIT_S = 60.0
REPLICAS = 2
ROWS, WAITING = 2, 2
SIZES = {"max_batch": ROWS, "max_waiting": WAITING, "slots": 64, "default_budget": 32}
LONG: dict[str, Any] = {"max_new_tokens": 900, "ignore_eos": True, "timeout_s": WAIT_S}
"""A completion of several seconds."""


class Application:
    """`python -m service.ray_serve`, and what can be seen of it."""

    def __init__(self, directory: Path) -> None:
        self.tables = directory / "tables"
        self.tables.mkdir()
        self._log = directory / "log"
        port, http_port = free_ports()
        self.address = f"127.0.0.1:{port}"
        flags = {
            "--port": port,
            "--http-port": http_port,
            "--num-replicas": REPLICAS,
            # Both fit on one processor, and a third beside one that is on its way out.
            "--num-cpus": 0.3,
            "--model": "reference",
            "--device": "cpu",
            "--threads": 1,
            "--tables": self.tables,
            "--grace": 30,
            **{f"--{name.replace('_', '-')}": value for name, value in SIZES.items()},
        }
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.ray_serve", "--insecure-bind"]
                + [str(word) for pair in flags.items() for word in pair],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "RAY_TMPDIR": "/tmp"},
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait(self, condition: Callable[[], bool], limit_s: float = WAIT_S) -> None:
        """Look again until `condition` holds; fail if the process ends or time is up first."""
        end = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.1)

    async def until(self, condition: Callable[[], bool]) -> None:
        await asyncio.to_thread(self.wait, condition)

    def family(self) -> list[psutil.Process]:
        """All that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> set[int]:
        """Process ids of the replicas that run."""
        found = set()
        for process in self.family():
            try:
                if process.cmdline()[:1] == ["ray::ServeReplica:a2sf:A2SF"]:
                    found.add(process.pid)
            except psutil.Error:
                continue
        return found

    def niceness(self) -> dict[str, int]:
        """Of each of Ray's own processes by its title: the niceness that it runs at."""
        found = {}
        for process in self.family():
            try:
                title = process.cmdline()[0]
                if title.startswith("ray::"):
                    found[title] = process.nice()
            except (psutil.Error, IndexError):
                continue
        return found

    def answered(self, request_id: str) -> list[tuple[int, str]]:
        """Who has answered the request, by process id, and with which outcome."""
        pattern = rf"pid=(\d+)\).* event=answered request_id={request_id} .*?outcome=(\w+)"
        return [(int(pid), outcome) for pid, outcome in re.findall(pattern, self.log)]


def free_ports() -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    application = Application(tmp_path_factory.mktemp("ray"))
    try:
        application.wait(lambda: "\nserving reference" in application.log, START_TIMEOUT_S)
        yield application
    finally:
        family = application.family() if application.process.poll() is None else []
        for process in [*family, application.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        application.process.wait(WAIT_S)


@pytest.fixture
async def client(application: Application) -> AsyncIterator[Client]:
    async with Client(application.address) as client:
        yield client


@pytest.fixture
async def plain(application: Application) -> AsyncIterator[str]:
    """The address of the server without Ray, in this process, with the same model and sizes."""
    options: dict[str, Any] = {"port": 0, "threads": 1, "tables": application.tables, **SIZES}
    server = Server(ServerOptions(model="reference", device="cpu", **options))
    port = await server.bind()
    await server.warm()
    yield f"127.0.0.1:{port}"
    await server.stop()


def test_ray_processes_run_at_the_priority_of_the_program(application: Application) -> None:
    niceness = application.niceness()
    kinds = {title.split(":")[2].partition(".")[0] for title in niceness}
    assert {"ServeReplica", "ProxyActor"} <= kinds
    assert set(niceness.values()) == {os.nice(0)}


async def stream_head(stub: Any, request: pb.StreamGenerateRequest) -> Any:
    return await stub.StreamGenerate(request).read()


async def text_of(client: Client, prompt: str, **options: Any) -> tuple[str, Finished]:
    """The text of a stream, and its end."""
    async with aclosing(client.stream_generate(prompt, **options)) as events:
        said = [event async for event in events]
    finished = said[-1]
    assert isinstance(finished, Finished)
    return "".join(event.text for event in said if isinstance(event, Delta)), finished


async def test_responses_equal_those_of_the_server_without_ray(client: Client, plain: str) -> None:
    prompts = [f"Tom has {number} apples and eats two of them." for number in range(6)]
    options: dict[str, Any] = {"max_new_tokens": 48, "sampling": Sampling(seed=5)}
    async with Client(plain) as other:
        expected = [await text_of(other, prompt, **options) for prompt in prompts]
        model, tokens = await other.get_model(), await other.tokenize(prompts[0])
    streamed, whole = await asyncio.gather(
        asyncio.gather(*(text_of(client, prompt, **options) for prompt in prompts)),
        asyncio.gather(*(client.generate(prompt, **options) for prompt in prompts)),
    )
    assert [text for text, _ in streamed] == [text for text, _ in expected]
    assert [answer.text for answer in whole] == [text for text, _ in expected]
    assert any(finished.cache.evicted_tokens for _, finished in expected)
    for (_, finished), (_, ours), answer in zip(expected, streamed, whole, strict=True):
        assert finished.reason == ours.reason == answer.finished.reason
        assert finished.usage == ours.usage == answer.finished.usage
        assert finished.cache == ours.cache == answer.finished.cache
    assert await client.get_model() == model
    assert await client.tokenize(prompts[0]) == tokens


async def test_both_replicas_work_at_once_and_ray_queues_further_calls(
    application: Application,
) -> None:
    count = REPLICAS * (ROWS + WAITING) + 6
    # Without retries, so every call must be admitted.
    async with grpc.aio.insecure_channel(
        application.address, [("grpc.enable_retries", 0)]
    ) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)

        async def ask(number: int) -> pb.GenerateResponse:
            request = pb.GenerateRequest()
            request.input.text, request.input.request_id = "x", f"many-{number}"
            request.input.max_new_tokens, request.input.ignore_eos = 20, True
            return await stub.Generate(request, timeout=WAIT_S)

        answers = await asyncio.gather(*(ask(number) for number in range(count)))
    assert [answer.finished.usage.completion_tokens for answer in answers] == [20] * count
    await application.until(
        lambda: all(application.answered(f"many-{number}") for number in range(count))
    )
    workers = [application.answered(f"many-{number}") for number in range(count)]
    assert all(len(one) == 1 for one in workers), "each is done once"
    assert {one[0][0] for one in workers} == application.replicas()


async def test_errors_equal_those_of_the_server_without_ray(
    application: Application, plain: str
) -> None:
    none = pb.GenerationInput()
    bad = pb.GenerationInput(text="x", max_new_tokens=0)
    bad.sampling.temperature = -1.0
    wide = pb.GenerationInput(text="x", max_new_tokens=1)
    wide.cache_policy.budget = 1000
    unknown = pb.GenerationInput(text="x", max_new_tokens=1)
    unknown.cache_policy.table = "nobody's"
    inputs = (none, bad, wide, unknown)
    for one in inputs:
        one.request_id = "wrong"

    async def failures(address: str) -> list[tuple[Any, ...]]:
        failures = []
        async with grpc.aio.insecure_channel(address) as channel:
            inference = pb_grpc.InferenceServiceStub(channel)
            models = pb_grpc.ModelServiceStub(channel)
            calls: list[Callable[[], Awaitable[Any]]] = [
                *(partial(inference.Generate, pb.GenerateRequest(input=one)) for one in inputs),
                *(
                    partial(stream_head, inference, pb.StreamGenerateRequest(input=one))
                    for one in inputs
                ),
                partial(inference.Tokenize, pb.TokenizeRequest()),
                partial(models.GetAlphaTable, pb.GetAlphaTableRequest(name="nobody's")),
            ]
            for call in calls:
                with pytest.raises(grpc.RpcError) as failure:
                    await call()
                error: Any = failure.value
                # Ray adds its own id of the request.
                trailers = {key: v for key, v in error.trailing_metadata() if key != "request_id"}
                # A call that names no request has an id that the server made up.
                details = re.sub(rb"[0-9a-f]{32}", b"made-up", trailers[DETAILS_KEY])
                trailers[DETAILS_KEY] = details
                failures.append((error.code(), error.details(), trailers))
        return failures

    ours, theirs = await failures(application.address), await failures(plain)
    assert ours == theirs
    assert sum(b"made-up" in trailers[DETAILS_KEY] for _, _, trailers in ours) == 2


async def test_cancelling_ends_the_completion(application: Application, client: Client) -> None:
    async with aclosing(client.stream_generate("x", request_id="left", **LONG)) as events:
        await anext(events)
    asking = asyncio.create_task(client.generate("x", request_id="cancelled", **LONG))
    await asyncio.sleep(0.3)
    asking.cancel()
    with pytest.raises(A2SFError, match="deadline"):
        await client.generate("x", request_id="late", **{**LONG, "timeout_s": 0.5})
    for name in ("left", "cancelled", "late"):
        await application.until(lambda name=name: bool(application.answered(name)))
        assert [outcome for _, outcome in application.answered(name)] == ["CANCELLED"]


async def test_health_reports_each_service(application: Application) -> None:
    async with grpc.aio.insecure_channel(application.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "a2sf.inference.v1.InferenceService", "a2sf.inference.v1.ModelService"):
            request = health_pb2.HealthCheckRequest(service=name)
            answer = await stub.Check(request, timeout=WAIT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for call, code in (
            (stub.Check(health_pb2.HealthCheckRequest(service="x")), grpc.StatusCode.NOT_FOUND),
            (stub.Watch(health_pb2.HealthCheckRequest()).read(), grpc.StatusCode.UNIMPLEMENTED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                await call
            assert caught.value.code() is code


async def test_every_replica_serves_a_table_that_is_put_into_the_directory(
    application: Application, client: Client
) -> None:
    assert not (await client.list_alpha_tables()).tables
    identity = load_model("reference", device="cpu").identity
    save_table(make_table(identity, name="new"), application.tables / "new.json")
    await application.until(
        lambda: (
            {
                int(pid)
                for pid in re.findall(r'pid=(\d+)\).*event="alpha table added"', application.log)
            }
            == application.replicas()
        )
    )
    assert set((await client.list_alpha_tables()).tables) == {"new"}


async def test_a_killed_replica_is_replaced_and_only_streams_that_had_begun_are_lost(
    application: Application, client: Client
) -> None:
    before = application.replicas()
    assert len(before) == REPLICAS
    begun: set[int] = set()
    lost: set[int] = set()

    async def stream(number: int) -> None:
        options = {"max_new_tokens": 150, "ignore_eos": True, "timeout_s": WAIT_S}
        said = client.stream_generate("x", request_id=f"stream-{number}", **options)
        try:
            async with aclosing(said) as events:
                async for _ in events:
                    begun.add(number)
        except Unavailable:
            assert number in begun, "a stream that had not begun is lost"
            lost.add(number)

    async def whole(number: int) -> None:
        answer = await client.generate(
            "x",
            request_id=f"whole-{number}",
            max_new_tokens=150,
            ignore_eos=True,
            timeout_s=WAIT_S,
        )
        assert answer.finished.usage.completion_tokens == 150

    count = REPLICAS * (ROWS + WAITING)
    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(whole(number))
            tasks.create_task(stream(number))
        # Some are begun, some accepted by a replica, and the others wait with Ray.
        while len(begun) < 2:
            await asyncio.sleep(0.01)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
    assert len(lost) <= ROWS
    assert begun == set(range(count))
    await application.until(lambda: len(application.replicas() - {victim}) == REPLICAS)
    await client.generate("x", max_new_tokens=1, timeout_s=WAIT_S)


async def test_sigterm_lets_a_stream_finish_and_leaves_no_process_behind(
    application: Application, client: Client
) -> None:
    family = application.family()
    names = {Path(process.name()).name for process in family}
    assert {"raylet", "gcs_server"} <= names, "it is this Ray that is watched"
    async with aclosing(client.stream_generate("x", **LONG)) as events:
        await anext(events)
        application.process.send_signal(signal.SIGTERM)
        await application.until(lambda: "\nstopping" in application.log)
        last = [event async for event in events][-1]
    assert isinstance(last, Finished)
    assert last.usage.completion_tokens == 900
    assert await asyncio.to_thread(application.process.wait, WAIT_S) == 0, application.log
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, 10)
    assert not alive
