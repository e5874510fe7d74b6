"""Everything at once, for minutes: every request ends in a documented way, and nothing is left.

A real server process and many clients that read, leave, wait too long, stop reading, or lose their
connection; tables are reloaded and requests aborted meanwhile. In float64, where a completion does
not depend on what else is in its batch, each text must be that of its solo run, or begin it.
"""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from a2sf.model.loader import load_model
from a2sf.tablefile import save_table
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from tests.service.conftest import ServerProcess, StartProcess
from tests.tables import make_table

SECONDS = float(os.environ.get("A2SF_SOAK_S", "150"))
CLIENTS = 64
SPECS = 48
TIMEOUT_S = 60.0
TOKEN = "a-token-of-the-operator"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS * 2 + 180)]

END = {pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP, pb.FINISH_REASON_END_OF_SEQUENCE}

POLICIES: tuple[Callable[[random.Random], pb.CachePolicy], ...] = (
    lambda rng: pb.CachePolicy(),
    lambda rng: pb.CachePolicy(table=rng.choice(("one", "two"))),
    lambda rng: pb.CachePolicy(alpha=rng.choice((0.0, 0.5, 0.99, 1.0)), budget=rng.randint(8, 64)),
    lambda rng: pb.CachePolicy(preset=pb.CACHE_PRESET_WINDOW, budget=rng.randint(8, 64)),
    lambda rng: pb.CachePolicy(preset=pb.CACHE_PRESET_H2O, budget=rng.randint(8, 64)),
    lambda rng: pb.CachePolicy(preset=pb.CACHE_PRESET_RANDOM, budget=16, random_seed=7),
    lambda rng: pb.CachePolicy(
        preset=pb.CACHE_PRESET_TOVA_PER_HEAD, budget=24, prefill_chunk=rng.choice((1, 8))
    ),
)


def spec(number: int) -> pb.GenerationInput:
    """One of the requests that are made again and again; each always gives the same text."""
    rng = random.Random(number)
    prompt = "".join(rng.choice("abcdefgh äß€ .") for _ in range(rng.randint(1, 150)))
    return pb.GenerationInput(
        text=prompt,
        max_new_tokens=rng.choice((1, 7, 30, 120)),
        ignore_eos=rng.random() < 0.5,
        stop=["ab"] if rng.random() < 0.3 else [],
        sampling=pb.Sampling(temperature=rng.choice((0.0, 1.0)), seed=number),
        cache_policy=rng.choice(POLICIES)(rng),
    )


@dataclass
class Tally:
    """What became of the requests of each kind of client."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def count(self, kind: str, end: str) -> None:
        self.ends[kind, end] += 1


# What may become of each kind's requests, besides a refusal because the server is full.
DOCUMENTED = {
    "reads": {"whole"},
    "asks for all": {"whole"},
    "leaves": {"CANCELLED", "whole"},
    "is in a hurry": {"DEADLINE_EXCEEDED", "whole"},
    "sets a limit": {"limited", "whole"},
    "stops reading": {"ABORTED", "whole"},
    "vanishes": {"UNAVAILABLE", "whole"},
    "is wrong": {"INVALID_ARGUMENT"},
    "is aborted": {"ABORTED", "whole"},
}


@dataclass
class World:
    """The server, what its texts must be, and what has been seen."""

    address: str
    solo: list[str]
    tally: Tally
    until: float
    channels: list[grpc.aio.Channel]
    admin: Any

    async def client(self, number: int) -> None:
        rng = random.Random(1000 + number)
        stub = pb_grpc.InferenceServiceStub(self.channels[number % len(self.channels)])
        kinds = list(DOCUMENTED)
        weights = [6 if kind == "reads" else 2 for kind in kinds]
        while time.monotonic() < self.until:
            (kind,) = rng.choices(kinds, weights)
            try:
                end = await getattr(self, "_" + kind.replace(" ", "_"))(stub, rng)
            except grpc.aio.AioRpcError as error:
                end = error.code().name
                if end == "RESOURCE_EXHAUSTED":
                    trailers: dict[Any, Any] = dict(error.trailing_metadata())  # type: ignore[arg-type]
                    assert "grpc-retry-pushback-ms" in trailers
                    await asyncio.sleep(rng.random())
            self.tally.count(kind, end)

    def _check(self, which: int, text: str, *, whole: bool) -> None:
        solo = self.solo[which]
        if text != solo if whole else not solo.startswith(text):
            self.tally.wrong.append(f"{which}: {text!r} is not of {solo!r}")

    async def _read(self, call: Any, which: int, most: int | None = None) -> str:
        """Read to the end, or `most` events; the text must be its solo run's."""
        text, seen, state = "", 0, "new"
        async for response in call:
            event = response.WhichOneof("event")
            expected = {"new": {"started"}, "started": {"delta", "finished"}}[state]
            assert event in expected, f"{event} after {state}"
            state = "started"
            seen += 1
            if event == "delta":
                text += response.delta.text
            self._check(which, text, whole=False)
            if event == "finished":
                if response.finished.reason == pb.FINISH_REASON_TIME_LIMIT:
                    return "limited"
                assert response.finished.reason in END
                self._check(which, text, whole=True)
                return "whole"
            if most is not None and seen >= most:
                return "left"
        raise AssertionError("a stream ended without its last event")

    def _stream(self, stub: Any, message: pb.GenerationInput, timeout: float = TIMEOUT_S) -> Any:
        return stub.StreamGenerate(pb.StreamGenerateRequest(input=message), timeout=timeout)

    async def _reads(self, stub: Any, rng: random.Random) -> str:
        which = rng.randrange(SPECS)
        return await self._read(self._stream(stub, spec(which)), which)

    async def _asks_for_all(self, stub: Any, rng: random.Random) -> str:
        which = rng.randrange(SPECS)
        answer = await stub.Generate(pb.GenerateRequest(input=spec(which)), timeout=TIMEOUT_S)
        self._check(which, answer.text, whole=True)
        return "whole"

    async def _leaves(self, stub: Any, rng: random.Random) -> str:
        which = rng.randrange(SPECS)
        call = self._stream(stub, spec(which))
        if rng.random() < 0.3:
            # Before anything came, as likely while it waits as while it is read.
            await asyncio.sleep(rng.random() * 0.2)
        else:
            end = await self._read(call, which, rng.randint(1, 20))
            if end != "left":
                return end
        call.cancel()
        return "CANCELLED"

    async def _is_in_a_hurry(self, stub: Any, rng: random.Random) -> str:
        which = rng.randrange(SPECS)
        timeout = rng.choice((0.001, 0.05, 0.2))
        return await self._read(self._stream(stub, spec(which), timeout), which)

    async def _sets_a_limit(self, stub: Any, rng: random.Random) -> str:
        which = rng.randrange(SPECS)
        message = spec(which)
        message.time_limit_seconds = rng.choice((0.01, 0.1, 0.5))
        return await self._read(self._stream(stub, message), which)

    async def _stops_reading(self, stub: Any, rng: random.Random) -> str:
        options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            message = pb.GenerationInput(
                text="x",
                max_new_tokens=2000,
                ignore_eos=True,
                output=pb.OutputOptions(logprobs=True, top_logprobs=20),
            )
            call = self._stream(pb_grpc.InferenceServiceStub(channel), message)
            responses = aiter(call)
            await anext(responses)
            await asyncio.sleep(4.0)
            last = [response async for response in responses][-1]
        return "whole" if last.WhichOneof("event") == "finished" else "cut"

    async def _vanishes(self, stub: Any, rng: random.Random) -> str:
        which = rng.randrange(SPECS)
        async with (
            cut_off(self.address) as (address, cut),
            grpc.aio.insecure_channel(address) as channel,
        ):
            call = self._stream(pb_grpc.InferenceServiceStub(channel), spec(which))
            end = await self._read(call, which, rng.randint(1, 20))
            if end != "left":
                return end
            cut()
            return await self._read_on(call)

    async def _read_on(self, call: Any) -> str:
        async for response in call:
            if response.WhichOneof("event") == "finished":
                return "whole"
        return "cut"

    async def _is_wrong(self, stub: Any, rng: random.Random) -> str:
        message = spec(0)
        message.max_new_tokens = rng.choice((0, 4_000_000))
        await self._stream(stub, message).read()
        return "taken"

    async def _is_aborted(self, stub: Any, rng: random.Random) -> str:
        which = rng.randrange(SPECS)
        message = spec(which)
        message.request_id = f"aborted-{rng.getrandbits(64)}"
        call = self._stream(stub, message)
        reading = asyncio.ensure_future(self._read(call, which))
        await asyncio.sleep(rng.random() * 0.3)
        await self.admin.AbortRequests(
            pb.AbortRequestsRequest(request_ids=[message.request_id]),
            timeout=TIMEOUT_S,
            metadata=BEARER,
        )
        return await reading


BEARER = (("authorization", f"Bearer {TOKEN}"),)


@asynccontextmanager
async def cut_off(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A way to `address` that can be cut, so that neither side hears of the other again."""
    host, port = address.rsplit(":", 1)
    writers: list[asyncio.StreamWriter] = []

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        writers.extend((writer, back))
        await asyncio.gather(pipe(reader, back), pipe(there, writer))

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", cut
    finally:
        cut()
        server.close()


async def probe(address: str, until: float) -> list[float]:
    """The seconds that health checks took, on a separate connection."""
    taken = []
    async with grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while time.monotonic() < until:
            started = time.monotonic()
            answer = await check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            taken.append(time.monotonic() - started)
            await asyncio.sleep(0.05)
    return taken


async def reload_tables(admin: Any, until: float) -> None:
    while time.monotonic() < until:
        await admin.ReloadAlphaTables(
            pb.ReloadAlphaTablesRequest(), timeout=TIMEOUT_S, metadata=BEARER
        )
        await asyncio.sleep(1.0)


async def weigh(process: ServerProcess, until: float) -> list[int]:
    seen = psutil.Process(process.process.pid)
    sizes = []
    while time.monotonic() < until:
        sizes.append(seen.memory_info().rss)
        await asyncio.sleep(0.5)
    return sizes


def check_ends(ends: Counter[tuple[str, str]], documented: dict[str, set[str]]) -> None:
    """Every call ended in a way that its kind may end in, and there was one of every kind."""
    summary = "\n".join(f"{kind}: {end} {count}" for (kind, end), count in sorted(ends.items()))
    print(summary)
    allowed = {(kind, end) for kind, all_ in documented.items() for end in all_}
    allowed |= {(kind, "RESOURCE_EXHAUSTED") for kind in documented}
    assert set(ends) <= allowed, summary
    assert {kind for kind, _ in ends} == set(documented), summary


async def until_idle(admin: Any) -> None:
    """Return once the server holds nothing of any request."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            load = await admin.GetLoad(pb.GetLoadRequest(), timeout=TIMEOUT_S, metadata=BEARER)
            if not (load.running or load.waiting or load.admitted or load.kv_bytes_used):
                break
            await asyncio.sleep(0.1)


async def test_many_clients_of_every_kind_leave_no_state(
    start_process: StartProcess, long_model_dir: Path, tmp_path: Path
) -> None:
    identity = load_model(str(long_model_dir), device="cpu", dtype="float32").identity
    tables = tmp_path / "tables"
    tables.mkdir()
    for name, sinks in (("one", 1), ("two", 3)):
        save_table(make_table(identity, name=name, sinks=sinks), tables / f"{name}.json")
    token_file = tmp_path / "tokens"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    process = start_process(
        *("--dtype", "float64", "--max-batch", "8", "--max-waiting", "32", "--step-tokens", "32"),
        *("--tables", str(tables), "--stall-timeout", "1", "--max-unread", "256"),
        *("--admin-port", "0", "--admin-token-file", str(token_file), "--threads", "1"),
    )
    address = await process.address()
    (line,) = [line for line in process.log.splitlines() if line.startswith("admin on ")]
    operators = grpc.aio.insecure_channel(line.removeprefix("admin on "))
    admin = pb_grpc.AdminServiceStub(operators)
    channels = [grpc.aio.insecure_channel(address) for _ in range(8)]
    stub = pb_grpc.InferenceServiceStub(channels[0])
    solo = []
    for number in range(SPECS):
        request = pb.GenerateRequest(input=spec(number))
        solo.append((await stub.Generate(request, timeout=TIMEOUT_S)).text)

    until = time.monotonic() + SECONDS
    world = World(address, solo, Tally(), until, channels, admin)
    async with asyncio.TaskGroup() as group:
        probing = group.create_task(probe(address, until))
        weighing = group.create_task(weigh(process, until))
        group.create_task(reload_tables(admin, until))
        for number in range(CLIENTS):
            group.create_task(world.client(number))
    health, sizes = sorted(probing.result()), weighing.result()

    assert not world.tally.wrong, world.tally.wrong[:3]
    check_ends(world.tally.ends, DOCUMENTED)

    print(f"health: {len(health)}, p99 {1e3 * health[int(0.99 * len(health))]:.1f} ms")
    assert health[int(0.99 * len(health))] < 1.0

    quarter = len(sizes) // 4
    early, late = (max(part) for part in (sizes[quarter : 2 * quarter], sizes[-quarter:]))
    print(f"memory: {early / 2**20:.1f} MiB in the second quarter, {late / 2**20:.1f} in the last")
    assert late - early < 32 * 2**20

    await until_idle(admin)
    for channel in (*channels, operators):
        await channel.close(None)
    assert "Traceback" not in process.log
    process.process.send_signal(signal.SIGTERM)
    assert await process.ended() == 0
