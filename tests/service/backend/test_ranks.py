"""A server whose model two processes share, as torchrun starts it: responses and shutdown."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from a2sf.errors import A2SFError
from a2sf.policy import CachePolicy
from a2sf.requests import Sampling
from service.client import Client
from tests.service.conftest import (
    ENDLESS,
    START_TIMEOUT_S,
    WAIT_S,
    ServerProcess,
    StartProcess,
)
from tests.torchrun import LAUNCH

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

StartRanks = Callable[..., ServerProcess]


@pytest.fixture
def start_ranks(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StartRanks]:
    """Start servers of two processes."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    started: list[ServerProcess] = []

    def start(*arguments: str) -> ServerProcess:
        process = start_process(
            *("--dtype", "float64", *arguments), program=(*LAUNCH, "-m", "service")
        )
        started.append(process)
        return process

    yield start
    # What torchrun started does not end with it where it is killed.
    for process in started:
        for child in children(process):
            child.kill()


def children(process: ServerProcess) -> list[psutil.Process]:
    if process.process.poll() is not None:
        return []
    return psutil.Process(process.process.pid).children()


def rank(process: ServerProcess, number: int) -> psutil.Process:
    (found,) = [c for c in children(process) if c.environ().get("RANK") == str(number)]
    return found


async def gone(processes: list[psutil.Process]) -> bool:
    return not (await asyncio.to_thread(psutil.wait_procs, processes, WAIT_S))[1]


async def ask(target: str) -> list[tuple[str, int, int]]:
    """Some completions at once that evict: the text, tokens evicted and bytes held by each."""
    requested_policies = [
        CachePolicy(preset="h2o", budget=16),
        CachePolicy(preset="random", budget=16, random_seed=3),
        CachePolicy(alpha=0.7, budget=16, prefill_chunk=4),
    ]
    async with Client(target) as client:
        done = await asyncio.gather(
            *(
                client.generate(
                    "The quick brown fox jumps over the lazy dog.",
                    max_new_tokens=30,
                    ignore_eos=True,
                    sampling=Sampling(temperature=0.7 * index, seed=index),
                    cache_policy=requested_policy,
                )
                for index, requested_policy in enumerate(requested_policies)
            )
        )
    return [
        (one.text, one.finished.cache.evicted_tokens, one.finished.cache.kv_bytes) for one in done
    ]


async def test_two_processes_serve_as_one_and_end_together(
    start_ranks: StartRanks, start_process: StartProcess, tmp_path: Path
) -> None:
    process = start_ranks()
    target = await process.address()
    got = await ask(target)
    assert all(evicted > 20 for _, evicted, _ in got)
    assert process.log.count("listening on") == 1
    assert process.log.count("event=loaded") == 1
    processes = children(process)
    assert len(processes) == 2
    rank(process, 0).send_signal(signal.SIGTERM)
    # torchrun's exit code tells of all processes.
    assert await process.ended() == 0, process.log
    assert await gone(processes)
    assert "Traceback" not in process.log

    (tmp_path / "alone").mkdir()
    alone = start_process("--dtype", "float64")
    assert await ask(await alone.address()) == got


async def test_sigterm_to_torchrun_lets_a_running_stream_finish_and_ends_all(
    start_ranks: StartRanks,
) -> None:
    process = start_ranks()
    processes = []
    async with (
        Client(await process.address()) as client,
        asyncio.timeout(START_TIMEOUT_S),
        aclosing(client.stream_generate("x", max_new_tokens=200, ignore_eos=True)) as events,
    ):
        await anext(events)
        processes = children(process)
        process.process.send_signal(signal.SIGTERM)
        await process.logged("stopping")
        last = [event async for event in events][-1]
        assert last.usage.completion_tokens == 200  # type: ignore[union-attr]
    # torchrun itself calls every signal a failure.
    assert await process.ended() == 1
    assert await gone(processes)
    assert "level=critical" not in process.log
    assert "[rank" not in process.log


@pytest.mark.parametrize("number", [0, 1])
async def test_a_process_that_is_killed_ends_the_server_and_its_streams_with_a_clear_message(
    start_ranks: StartRanks, number: int
) -> None:
    process = start_ranks()
    processes = []
    async with (
        Client(await process.address()) as client,
        asyncio.timeout(START_TIMEOUT_S),
        aclosing(client.stream_generate("x", **ENDLESS)) as events,
    ):
        await anext(events)
        processes = children(process)
        rank(process, number).kill()
        with pytest.raises(A2SFError):
            async for _ in events:
                pass
    assert await process.ended() == 1
    assert await gone(processes)
    assert f"rank {1 - number} of 2 has lost another rank, which must have ended" in process.log


async def test_a_process_that_is_killed_while_nothing_runs_ends_the_server_too(
    start_ranks: StartRanks,
) -> None:
    process = start_ranks()
    await process.address()
    processes = children(process)
    rank(process, 1).kill()
    assert await process.ended() == 1
    assert await gone(processes)
    assert "rank 0 of 2 has lost another rank, which must have ended" in process.log


async def test_an_error_of_one_process_is_reported_and_ends_all(start_ranks: StartRanks) -> None:
    process = start_ranks("--device", "cuda:0")
    assert await process.ended() == 1
    # By the one that found it first: torchrun ends the other.
    assert "device: 'cuda:0'; accepted under torchrun on this machine: auto, cpu" in process.log
