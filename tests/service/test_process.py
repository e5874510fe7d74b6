"""The server as a process with flags, signals, a port file and an exit code."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import aclosing
from pathlib import Path

import pytest

from a2sf.errors import A2SFError, Unavailable
from a2sf.requests import Finished
from service.client import AdminClient, ChannelOptions, Client
from service.client.results import StreamEvent
from tests.service.conftest import ENDLESS, START_TIMEOUT_S, WAIT_S, ServerProcess, StartProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

# Serves as `python -m service` does, with an engine that dies at the third step of a long request.
FRAGILE = """
from a2sf.engine.engine import Engine
from service.__main__ import main
step, steps = Engine.step, iter(range(10))
def fragile(self):
    if next(steps) > 5:
        raise RuntimeError("a secret of the house")
    return step(self)
Engine.step = fragile
main()
"""


async def serving(process: ServerProcess) -> Client:
    return Client(await process.address())


async def test_the_server_starts_streams_and_exits_0_on_sigterm(
    start_process: StartProcess, tmp_path: Path
) -> None:
    process = start_process()
    async with await serving(process) as client:
        answer = await client.generate("Hello", max_new_tokens=5, ignore_eos=True)
        assert answer.finished.usage.completion_tokens == 5
    process.process.send_signal(signal.SIGTERM)
    assert await process.ended() == 0, process.log
    assert not (tmp_path / "port").exists()
    assert "serving" in process.log
    assert "Traceback" not in process.log
    assert "Hello" not in process.log, "prompts are not logged"
    assert re.search(r"loaded .*dtype=torch\.\w+ dtype_reason=\S", process.log), process.log


@pytest.mark.skipif(sys.platform != "linux", reason="torch's wheel brings libgomp on Linux alone")
@pytest.mark.parametrize(("given", "spins"), [(None, "'0'"), ("ACTIVE", "'30000000000'")])
async def test_engine_threads_wait_passively_by_default(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch, given: str | None, spins: str
) -> None:
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    server = start_process()
    await server.logged(f"GOMP_SPINCOUNT = {spins}")


async def test_sigterm_lets_a_running_stream_finish(start_process: StartProcess) -> None:
    process = start_process()
    async with (
        await serving(process) as client,
        asyncio.timeout(START_TIMEOUT_S),
        aclosing(client.stream_generate("x", max_new_tokens=300, ignore_eos=True)) as events,
    ):
        await anext(events)
        process.process.send_signal(signal.SIGINT)
        await process.logged("stopping")
        last = [event async for event in events][-1]
        assert isinstance(last, Finished)
        assert last.usage.completion_tokens == 300
        assert await process.ended() == 0, process.log
    last_line = process.log.splitlines()[-1]
    assert last_line == "stopped; completions that ended while stopping: 1 finished, 0 unfinished"


@pytest.mark.timeout(300)
async def test_sigterm_under_load_finishes_accepted_requests_and_refuses_new_ones(
    start_process: StartProcess, tmp_path: Path
) -> None:
    token = "admin-token-0123456789"
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{token}\n")
    # Far more than 6,400 tokens take, on a busy machine too.
    grace_s = 180.0
    process = start_process(
        *("--max-batch", "2", "--grace", f"{grace_s:g}"),
        *("--admin-port", "0", "--admin-token-file", str(tokens)),
    )
    async with await serving(process) as client, asyncio.timeout(START_TIMEOUT_S + grace_s):
        found = re.search(r"^admin on (\S+)$", process.log, re.MULTILINE)
        assert found is not None
        first = [asyncio.Event() for _ in range(8)]

        async def complete(started: asyncio.Event) -> StreamEvent:
            stream = client.stream_generate("x", max_new_tokens=800, ignore_eos=True)
            async with aclosing(stream) as events:
                await anext(events)
                started.set()
                return [event async for event in events][-1]

        async with AdminClient(found[1], ChannelOptions(token=token)) as operator:
            await operator.get_load()
            streams = [asyncio.create_task(complete(started)) for started in first]
            # All are taken: two run, and the others wait for their rows.
            while (await operator.get_load()).admitted < len(streams):
                await asyncio.sleep(0.01)
        at = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        await process.logged("stopping")
        with pytest.raises(Unavailable, match="shutting down"):
            await client.generate("late", max_new_tokens=1, timeout_s=WAIT_S)
        assert not all(started.is_set() for started in first), "some still wait in the queue"
        # Those that waited had been taken too.
        for last in await asyncio.gather(*streams):
            assert isinstance(last, Finished)
            assert last.usage.completion_tokens == 800
        assert await process.ended() == 0, process.log
        assert time.monotonic() - at < grace_s


async def test_requests_that_exceed_the_grace_are_ended_and_the_exit_code_is_0(
    start_process: StartProcess,
) -> None:
    process = start_process("--grace", "0.2")
    async with (
        await serving(process) as client,
        asyncio.timeout(START_TIMEOUT_S),
        aclosing(client.stream_generate("x", **ENDLESS)) as events,
    ):
        await anext(events)
        process.process.send_signal(signal.SIGTERM)
        with pytest.raises(Unavailable, match="shutting down"):
            async for _ in events:
                pass
        assert await process.ended() == 0, process.log
    assert process.log.splitlines()[-1].endswith("while stopping: 0 finished, 1 unfinished")


async def test_a_second_signal_ends_the_process_at_once(start_process: StartProcess) -> None:
    process = start_process("--grace", "1000")
    async with (
        await serving(process) as client,
        asyncio.timeout(START_TIMEOUT_S),
        aclosing(client.stream_generate("x", **ENDLESS)) as events,
    ):
        await anext(events)
        process.process.send_signal(signal.SIGTERM)
        await process.logged("stopping")
        process.process.send_signal(signal.SIGTERM)
        assert await process.ended() == 128 + signal.SIGTERM
        with pytest.raises(A2SFError):
            async for _ in events:
                pass


async def test_other_ports_are_announced_and_the_server_settles_before_it_refuses(
    start_process: StartProcess, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("admin-token-0123456789\n")
    process = start_process(
        *("--admin-port", "0", "--admin-token-file", str(tokens), "--metrics-port", "0"),
        *("--settle", "3"),
    )
    async with await serving(process) as client:
        assert re.search(r"^admin on 127\.0\.0\.1:\d+$", process.log, re.MULTILINE)
        found = re.search(
            r"^metrics on (http://127\.0\.0\.1:\d+/metrics)$", process.log, re.MULTILINE
        )
        assert found is not None
        with urllib.request.urlopen(found[1], timeout=WAIT_S) as answer:
            assert b"a2sf_model_info" in answer.read()
        process.process.send_signal(signal.SIGTERM)
        await process.logged("stopping")
        await client.generate("x", max_new_tokens=2)
        assert await process.ended() == 0, process.log


async def test_with_json_logs_every_line_is_json(
    start_process: StartProcess, tmp_path: Path
) -> None:
    token = "admin-token-0123456789"
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{token}\n")
    process = start_process(
        *("--admin-port", "0", "--admin-token-file", str(tokens), "--metrics-port", "0"),
        *("--log-format", "json"),
    )
    address = await process.address()
    lines = [json.loads(line) for line in process.log.splitlines()]
    by_event = {line["event"]: line for line in lines}
    assert by_event["listening"]["address"] == by_event["serving"]["address"] == address
    assert by_event["serving"]["model"] == by_event["listening"]["model"]
    with urllib.request.urlopen(by_event["metrics"]["url"], timeout=WAIT_S) as answer:
        assert answer.status == 200
    async with (
        AdminClient(by_event["admin"]["address"], ChannelOptions(token=token)) as operator,
        Client(address) as client,
    ):
        await operator.get_load()
        await operator.get_load()
        await client.generate("x", max_new_tokens=2, request_id="mine")
    process.process.send_signal(signal.SIGTERM)
    assert await process.ended() == 0, process.log
    lines = [json.loads(line) for line in process.log.splitlines()]
    assert "stopping" in {line["event"] for line in lines}
    assert lines[-1]["event"] == "stopped"
    assert (lines[-1]["finished"], lines[-1]["unfinished"]) == (0, 0), "only those of the drain"
    # Each call can be found, those of operators too.
    ids = [line["request_id"] for line in lines if line["event"] == "answered"]
    assert "mine" in ids
    assert len(set(ids)) == len(ids) == 3
    assert min(map(len, ids)) > 1


async def test_with_json_logs_a_failed_start_is_a_json_line(
    start_process: StartProcess, tmp_path: Path
) -> None:
    process = start_process("--log-format", "json", "--default-table", "absent")
    assert await process.ended() == 2
    last = [json.loads(line) for line in process.log.splitlines()][-1]
    assert (last["event"], last["level"]) == ("cannot serve", "critical")
    assert "absent" in last["reason"]


async def test_sigterm_during_loading_ends_the_process(start_process: StartProcess) -> None:
    process = start_process()
    await process.logged("listening")
    process.process.send_signal(signal.SIGTERM)
    assert await process.ended() == 0, process.log


async def test_a_killed_client_frees_its_row(start_process: StartProcess) -> None:
    server = start_process("--max-batch", "1")
    address = await server.address()
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service.client", "x", "--target", address),
        *("--max-new-tokens", "900000", "--ignore-eos"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert client.stdout is not None
    await asyncio.wait_for(client.stdout.read(1), START_TIMEOUT_S)
    client.kill()
    await asyncio.wait_for(client.wait(), WAIT_S)
    await server.logged("outcome=CANCELLED")
    async with Client(address) as other:
        await other.generate("y", max_new_tokens=2, timeout_s=WAIT_S)


async def test_an_engine_crash_ends_the_process_with_a_failure(
    start_process: StartProcess,
) -> None:
    process = start_process(program=("-c", FRAGILE))
    async with await serving(process) as client:
        with pytest.raises(A2SFError, match="INTERNAL") as caught:
            await client.generate("x", timeout_s=START_TIMEOUT_S, **ENDLESS)
        assert "secret" not in str(caught.value)
    assert await process.ended() == 1
    assert "a secret of the house" in process.log


async def test_the_health_command_checks_a_server(start_process: StartProcess) -> None:
    process = start_process()
    address = await process.address()

    async def ask(target: str) -> tuple[int, str]:
        asked = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.health", "--target", target),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(asked.communicate(), WAIT_S)
        assert asked.returncode is not None
        return asked.returncode, output.decode()

    assert await ask(address) == (0, f"{address}: SERVING\n")
    process.process.send_signal(signal.SIGTERM)
    await process.ended()
    code, output = await ask(address)
    assert (code, output) == (1, f"{address}: UNAVAILABLE\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port-file", "/"), "--port-file: /: "),
        (("--model", "/no/such/model"), "no such directory"),
        (("--host", "0.0.0.0"), "--insecure-bind"),
    ],
    ids=["no place for the port", "unknown model", "open to all"],
)
def test_a_failed_start_prints_one_line_with_the_reason(
    arguments: tuple[str, ...], message: str
) -> None:
    check_refused(arguments, message)


def test_a_port_in_use_is_reported_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        check_refused(("--port", str(taken.getsockname()[1])), "Address already in use")


def check_refused(arguments: tuple[str, ...], message: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "service", "--port", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
