"""The client's command line: tokens, one line of figures, and errors in one line."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog
from typer.testing import CliRunner

from a2sf.requests import CacheStatistics, Finished, FinishReason, Timings, Usage
from service.client_cli import app
from service.client_display import figures
from tests.service.conftest import WAIT_S, StartServer, until


@pytest.fixture(autouse=True)
def _the_server_in_this_process_logs_elsewhere() -> Iterator[None]:
    """Its log would go to the output under test."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


async def run(*arguments: str) -> tuple[int, str, str]:
    """Run the command line beside this loop, which the server needs."""
    result = await asyncio.wait_for(
        asyncio.to_thread(CliRunner().invoke, app, list(arguments)), WAIT_S
    )
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


async def test_it_prints_the_completion_and_one_line_of_figures(
    start_server: StartServer,
) -> None:
    _, _, address = await start_server()
    options = ["--max-new-tokens", "40", "--temperature", "0", "--ignore-eos"]
    code, out, err = await run("Hello", "--target", address, "--budget", "16", *options)
    assert (code, err) == (0, "")
    text, line = out.rstrip("\n").rsplit("\n", 1)
    assert text
    assert line.startswith("40 tokens (length), ")
    assert "kept 16 of 44 tokens, evicted 28" in line
    assert line.endswith("in a full cache")


async def test_every_flag_reaches_the_server(start_server: StartServer) -> None:
    _, _, address = await start_server()
    code, _, err = await run(
        *("x", "--target", address, "--max-new-tokens", "2", "--alpha", "0.5", "--sinks", "1"),
        *("--budget-ratio", "0.9", "--recent-share", "0.1", "--prefill-chunk", "1"),
        *("--top-k", "5", "--top-p", "0.9", "--min-p", "0.01", "--seed", "1", "--stop", "zz"),
    )
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--table", "mathqa"], "no alpha table 'mathqa'; served: none"),
        (["--budget", "65"], "at most 64 slots"),
        (["--alpha", "1.5"], "less than or equal to 1"),
        (["--alpha", "0.5", "--preset", "h2o"], "at most one of preset, table, alpha"),
        (["--max-new-tokens", "0"], "greater than or equal to 1"),
        (["--max-new-tokens", "-1"], "out of range"),
        (["--max-new-tokens", "900000", "--ignore-eos", "--timeout", "0.2"], "0.2 s"),
    ],
)
async def test_an_error_is_one_line_on_stderr_and_not_exit_code_0(
    start_server: StartServer, arguments: list[str], told: str
) -> None:
    _, _, address = await start_server()
    code, _, err = await run("x", "--target", address, *arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


async def test_a_server_that_is_not_there_is_told_in_one_line() -> None:
    code, out, err = await run("x", "--target", "127.0.0.1:1", "--timeout", "10")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "127.0.0.1:1" in err


async def test_a_reader_that_leaves_ends_it_quietly(start_server: StartServer) -> None:
    server, _, address = await start_server()
    reading, writing = os.pipe()
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service.client", "x", "--target", address, "--ignore-eos"),
        *("--max-new-tokens", "900000"),
        stdout=writing,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(writing)
    assert client.stderr is not None
    async with asyncio.timeout(WAIT_S):
        await asyncio.to_thread(os.read, reading, 1)
        os.close(reading)
        assert await client.stderr.read() == b""
        assert await client.wait() == 1
    await until(lambda: not server.inside)


def test_a_client_loads_no_engine() -> None:
    code = "import sys, service.client_cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S)


def test_the_figures_are_for_people() -> None:
    finished = Finished(
        request_id="r",
        reason=FinishReason.LENGTH,
        matched_stop=None,
        usage=Usage(prompt_tokens=100, completion_tokens=21),
        cache=CacheStatistics(
            budget=64,
            kept_tokens=64,
            evicted_tokens=56,
            kv_bytes=1_500_000,
            kv_bytes_full=2_800_000,
        ),
        timings=Timings(queue_s=0.0, prefill_s=0.1, decode_s=2.0),
    )
    assert figures(finished) == (
        "21 tokens (length), 10.0 tokens/s; each head kept 64 of 120 tokens, evicted 56; "
        "KV 1.5 MB against 2.8 MB in a full cache"
    )
