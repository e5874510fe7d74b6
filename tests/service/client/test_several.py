"""Two servers as processes behind one client: killed, drained, restarted, both down."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from a2sf.errors import Unavailable
from a2sf.requests import Delta, Sampling
from service.client import Client, SyncClient
from service.client.results import StreamStarted
from tests.service.conftest import START_TIMEOUT_S, WAIT_S, ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPTS = [f"{count} birds sat on a wire and" for count in range(2, 8)]
TOKENS = 40
GREEDY = Sampling(temperature=0)
REQUESTS, AT_ONCE = 60, 8
PROMPT_END_S = 5.0
"""What a cut stream may take to tell so: the kernel of a killed process closes its connections."""

Start = Callable[..., ServerProcess]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start servers, each with a separate folder; both share two cores with the client."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    started: list[ServerProcess] = []

    def start(port: int = 0) -> ServerProcess:
        place = tmp_path / f"server-{len(started)}"
        place.mkdir()
        server = ServerProcess(
            place,
            (
                *("--model", "reference", "--device", "cpu", "--port", str(port)),
                *("--max-batch", "2", "--slots", "128", "--default-budget", "32"),
                *("--grace", "60"),
            ),
            ("-m", "service"),
        )
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


@dataclass
class Load:
    """What became of each request; none may be left out."""

    done: list[tuple[str, str]] = field(default_factory=list)
    """Prompts with their texts."""
    cut: list[float] = field(default_factory=list)
    """When streams ended as Unavailable once they had started."""
    lost: list[Exception] = field(default_factory=list)
    """How requests ended that had not."""

    async def run(self, client: Client) -> None:
        """Make all requests, with a limit on concurrent ones."""
        left = iter(range(REQUESTS))

        async def work() -> None:
            for index in left:
                await self._one(client, PROMPTS[index % len(PROMPTS)])

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        assert len(self.done) + len(self.cut) + len(self.lost) == REQUESTS

    async def _one(self, client: Client, prompt: str) -> None:
        text, started = "", False
        try:
            stream = client.stream_generate(
                prompt, max_new_tokens=TOKENS, sampling=GREEDY, ignore_eos=True, timeout_s=60
            )
            async for event in stream:
                started = started or isinstance(event, StreamStarted)
                text += event.text if isinstance(event, Delta) else ""
        except Unavailable as error:
            if started:
                self.cut.append(time.monotonic())
            else:
                self.lost.append(error)
        else:
            self.done.append((prompt, text))

    async def reached(self, count: int) -> None:
        """Wait until this number of requests has finished."""
        while len(self.done) < count:
            await asyncio.sleep(0.01)


def answered(server: ServerProcess, outcome: str = "OK") -> int:
    return server.log.count(f"outcome={outcome}")


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def alone(address: str) -> dict[str, str]:
    """The texts of one server that has one request at a time."""
    async with Client(address) as client:
        return {
            prompt: (
                await client.generate(
                    prompt, max_new_tokens=TOKENS, sampling=GREEDY, ignore_eos=True
                )
            ).text
            for prompt in PROMPTS
        }


async def serve(client: Client, until: Callable[[], bool]) -> int:
    """Make small requests, one after the other, until that holds; return their number."""
    made = 0
    while not until():
        await client.generate("x", max_new_tokens=1, timeout_s=WAIT_S)
        made += 1
    return made


@asynccontextmanager
async def both(start: Start) -> AsyncIterator[tuple[list[ServerProcess], list[str], Client]]:
    """Two servers, and a client that has reached both."""
    servers = [start(), start()]
    addresses = [await server.address() for server in servers]
    async with Client(",".join(addresses)) as client, asyncio.timeout(270):
        await serve(client, until=lambda: all(answered(server) for server in servers))
        yield servers, addresses, client


async def test_a_killed_server_loses_only_started_streams_and_is_used_again(
    start: Start,
) -> None:
    async with both(start) as (servers, addresses, client):
        before = [answered(server) for server in servers]
        await serve(client, until=lambda: sum(map(answered, servers)) >= sum(before) + 20)
        shares = [answered(server) - b for server, b in zip(servers, before, strict=True)]
        assert min(shares) >= 9, shares

        texts = await alone(addresses[0])
        load, (stays, goes) = Load(), servers
        running = asyncio.create_task(load.run(client))
        await load.reached(REQUESTS // 3)
        assert answered(goes) > before[1] + shares[1]
        killed = time.monotonic()
        goes.process.kill()
        await running
        assert load.lost == []
        # Two rows, and no more than that had started.
        assert 1 <= len(load.cut) <= 2
        assert max(load.cut) - killed < PROMPT_END_S
        assert all(text == texts[prompt] for prompt, text in load.done)
        assert len({prompt for prompt, _ in load.done}) == len(PROMPTS)
        assert answered(stays, "UNAVAILABLE") == 0

        back = start(port_of(addresses[1]))
        await back.address()
        async with asyncio.timeout(WAIT_S):
            await serve(client, until=lambda: answered(back) >= 2)

        for server in (stays, back):
            server.process.kill()
            await server.ended()
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(Unavailable, match=f"connection to {addresses[0]},.* failed"):
                await client.generate("x", max_new_tokens=1, timeout_s=60)
            assert time.monotonic() - began < PROMPT_END_S

        again = start(port_of(addresses[0]))
        await again.address()
        await until_served(client)
        assert answered(again)


async def until_served(client: Client) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            try:
                await client.generate("x", max_new_tokens=1)
            except Unavailable:
                await asyncio.sleep(0.5)
            else:
                return


async def test_a_drained_server_loses_nothing(start: Start) -> None:
    async with both(start) as (servers, addresses, client):
        texts = await alone(addresses[0])
        load, (stays, goes) = Load(), servers
        running = asyncio.create_task(load.run(client))
        await load.reached(REQUESTS // 3)
        goes.process.send_signal(signal.SIGTERM)
        await running
        assert (load.lost, load.cut) == ([], [])
        assert all(text == texts[prompt] for prompt, text in load.done)
        assert await goes.ended() == 0, goes.log
        assert answered(stays, "UNAVAILABLE") == 0


async def test_a_killed_server_loses_no_unary_call(start: Start) -> None:
    async with both(start) as (servers, addresses, _):
        goes = servers[0]
        with SyncClient(",".join(addresses)) as client:

            def one(prompt: str) -> str:
                return client.generate(
                    prompt, max_new_tokens=TOKENS, sampling=GREEDY, ignore_eos=True, timeout_s=60
                ).text

            def calls() -> list[asyncio.Task[str]]:
                return [asyncio.create_task(asyncio.to_thread(one, prompt)) for prompt in PROMPTS]

            expected = await asyncio.gather(*calls())
            under_way = calls()
            # Four that run and two that wait, of which one alone is done.
            await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            goes.process.kill()
            assert await asyncio.gather(*under_way) == expected
