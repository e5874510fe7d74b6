"""The client's command line: tokens, one line of figures, and errors in one line."""

import asyncio
import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import structlog
import trustme
from google.protobuf.json_format import Parse
from typer.testing import CliRunner

from service.client.terminal.cli import app
from service.pb import inference_pb2 as pb
from tests.service.client.test_responses import load_with_template
from tests.service.conftest import ENDLESS, WAIT_S, StartServer, until


@pytest.fixture(autouse=True)
def _the_server_in_this_process_logs_elsewhere() -> Iterator[None]:
    """Its log would go to the output under test."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


async def run(*arguments: str, said: str | None = None) -> tuple[int, str, str]:
    """Run the command line beside this loop, which the server needs; `said` is its stdin."""
    result = await asyncio.wait_for(
        asyncio.to_thread(CliRunner().invoke, app, list(arguments), input=said), WAIT_S
    )
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


async def test_the_client_prints_the_completion_and_one_line_of_figures(
    start_server: StartServer,
) -> None:
    _, _, address = await start_server()
    options = ["--max-new-tokens", "40", "--temperature", "0", "--ignore-eos"]
    code, out, err = await run("Hello", "--target", address, "--budget", "16", *options)
    assert (code, err) == (0, "")
    text, line = out.rstrip("\n").rsplit("\n", 1)
    assert text
    assert line.startswith("40 tokens (length), ")
    assert "; a2sf, alpha 0.98, 5 tokens recent, budget 16 tokens; " in line
    assert "; each head kept 16 of 44 tokens, evicted 28; " in line
    assert line.endswith("in a full cache")


async def test_every_flag_reaches_the_server(start_server: StartServer) -> None:
    _, _, address = await start_server()
    code, out, err = await run(
        *("x", "--target", address, "--max-new-tokens", "4", "--alpha", "0.5", "--sinks", "1"),
        *("--budget-ratio", "0.1", "--recent-share", "0.1", "--prefill-chunk", "1"),
        *("--min-budget", "4"),
        *("--top-k", "5", "--top-p", "0.9", "--min-p", "0.01", "--seed", "1", "--stop", "zz"),
        *("--min-new-tokens", "2", "--time-limit", "20", "--stop-token-id", "3", "--ignore-eos"),
        *("--repetition-penalty", "1.1", "--request-id", "mine", "--logprobs"),
        *("--top-logprobs", "2", "--echo", "--json"),
    )
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    started, finished = events[0]["started"], events[-1]["finished"]
    policy = started["cache_policy"]
    assert (started["request_id"], started["seed"]) == ("mine", "1")
    assert started["prompt"]["text"] == "x"
    assert (policy["alpha"], policy["sinks"], policy["prefill_chunk"]) == (0.5, 1, 1)
    assert (policy["budget"], policy["min_budget"]) == (4, 4)
    assert finished["usage"]["completion_tokens"] >= 2
    tokens = [one for event in events[1:-1] for one in event["delta"]["logprobs"]]
    assert all(len(one["top"]) == 2 for one in tokens)


REFUSED_HERE = {
    "input.cache_policy.min_budget",
    *(f"input.sampling.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "seed")),
    "input.sampling.repetition_penalty",
    *(f"input.cache_policy.{name}" for name in ("budget_ratio", "recent", "recent_share", "sinks")),
    *(f"input.cache_policy.{name}" for name in ("prefill_chunk", "random_seed")),
}
"""Fields whose values the client refuses before any call."""


async def test_invalid_flag_values_are_reported_by_field(start_server: StartServer) -> None:
    _, _, address = await start_server()
    for flag, value, field in [
        ("--repetition-penalty", "0", "input.sampling.repetition_penalty"),
        ("--temperature", "-1", "input.sampling.temperature"),
        ("--top-k", "-1", "input.sampling.top_k"),
        ("--top-p", "2", "input.sampling.top_p"),
        ("--min-p", "2", "input.sampling.min_p"),
        ("--seed", "-1", "input.sampling.seed"),
        ("--min-new-tokens", "9", "input.min_new_tokens"),
        ("--time-limit", "0", "input.time_limit_seconds"),
        ("--stop", "", "input.stop[0]"),
        ("--stop-token-id", "99999", "input.stop_token_ids"),
        ("--top-logprobs", "1", "input.output.top_logprobs"),
        ("--request-id", "a b", "input.request_id"),
        ("--budget-ratio", "2", "input.cache_policy.budget_ratio"),
        ("--min-budget", "-1", "input.cache_policy.min_budget"),
        ("--recent", "-1", "input.cache_policy.recent"),
        ("--recent-share", "2", "input.cache_policy.recent_share"),
        ("--sinks", "-1", "input.cache_policy.sinks"),
        ("--prefill-chunk", "-1", "input.cache_policy.prefill_chunk"),
        ("--random-seed", "-1", "input.cache_policy.random_seed"),
    ]:
        given = ["x", "--target", address, "--max-new-tokens", "4", "--json", flag, value]
        code, _, err = await run(*given)
        assert code == (2 if field in REFUSED_HERE else 1), flag
        assert json.loads(err)["error"]["field_violations"][0]["field"] == field


async def test_json_output_has_each_event_unchanged(start_server: StartServer) -> None:
    _, _, address = await start_server()
    flags = ["x", "--target", address, "--max-new-tokens", "5", "--temperature", "0"]
    _, plain, _ = await run(*flags)
    code, out, err = await run(*flags, "--json")
    assert (code, err) == (0, "")
    events = [Parse(line, pb.StreamGenerateResponse()) for line in out.splitlines()]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["delta"] * (len(events) - 2), "finished"]
    assert plain.startswith("".join(event.delta.text for event in events) + "\n")


async def test_an_error_in_json_is_one_object_with_code_and_fields(
    start_server: StartServer,
) -> None:
    _, _, address = await start_server()
    drawn_and_kept = ["input.sampling.temperature", "input.cache_policy.alpha"]
    for flags, exits, code, fields in [
        (["--budget", "65"], 1, "INVALID_ARGUMENT", ["input.cache_policy.budget"]),
        (["--alpha", "2", "--temperature", "-1"], 2, "INVALID_ARGUMENT", drawn_and_kept),
        (["--table", "t"], 1, "NOT_FOUND", []),
        (["--timeout", "0.2", "--max-new-tokens", "900000"], 1, "DEADLINE_EXCEEDED", []),
    ]:
        given = ["x", "--target", address, "--json", "--ignore-eos", *flags]
        exit_code, _, err = await run(*given)
        shown = json.loads(err)["error"]
        assert (exit_code, shown["code"]) == (exits, code)
        assert shown["message"]
        assert [v["field"] for v in shown.get("field_violations", ())] == fields


async def test_a_full_server_in_json_includes_the_retry_delay(
    start_server: StartServer,
) -> None:
    server, client, address = await start_server(max_batch=1, max_waiting=0)
    async with aclosing(client.stream_generate("x", **ENDLESS)) as events:
        await anext(events)
        code, _, err = await run("y", "--target", address, "--json")
    assert code == 1
    shown = json.loads(err)["error"]
    assert (shown["code"], shown["retry_after_seconds"]) == ("RESOURCE_EXHAUSTED", 0.5)
    await until(lambda: not server.num_calls)


async def test_a_conversation_keeps_its_history_until_reset(
    start_server: StartServer,
) -> None:
    _, _, address = await start_server(load_with_template)
    flags = ["--chat", "--system", "Brief.", "--target", address, "--max-new-tokens", "3"]
    said = "One\n\nTwo\n/reset\nThree\n/quit\nnever\n"
    code, out, err = await run(*flags, "--echo", "--json", said=said)
    assert (code, err) == (0, "")
    events = [Parse(line, pb.StreamGenerateResponse()) for line in out.splitlines()]
    prompts = [e.started.prompt.text for e in events if e.WhichOneof("event") == "started"]
    ends = [index for index, e in enumerate(events) if e.WhichOneof("event") == "finished"]
    first_answer = "".join(event.delta.text for event in events[: ends[0]])
    assert prompts == [
        "<system>Brief.<user>One<assistant>",
        f"<system>Brief.<user>One<assistant>{first_answer}<user>Two<assistant>",
        "<system>Brief.<user>Three<assistant>",
    ]


async def test_one_message_is_answered_from_the_command_line_or_stdin(
    start_server: StartServer,
) -> None:
    _, _, address = await start_server(load_with_template)
    flags = ["--chat", "--target", address, "--max-new-tokens", "2", "--echo"]
    code, out, _ = await run("Hello", *flags, "--system", "Brief.")
    assert code == 0
    assert out.startswith("<system>Brief.<user>Hello<assistant>")
    code, out, _ = await run("-", *flags, said="Two\nlines\n")
    assert code == 0
    assert out.startswith("<user>Two\nlines\n<assistant>")


async def test_a_model_without_a_template_is_reported_in_one_line(
    start_server: StartServer,
) -> None:
    _, _, address = await start_server()
    code, out, err = await run("--chat", "--target", address, said="Hello\nAgain\n")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "chat template" in err


@pytest.mark.parametrize(
    "arguments",
    [["--seed", "1"], ["x", "--system", "y"], ["x", "--server-name", "y"], ["--no-such"]],
)
async def test_an_invalid_command_line_exits_2(arguments: list[str]) -> None:
    code, out, err = await run(*arguments)
    assert (code, out) == (2, "")
    assert err


async def test_token_and_certificates_reach_the_server(
    start_server: StartServer, tmp_path: Path
) -> None:
    ca = trustme.CA()
    theirs, mine = ca.issue_cert("127.0.0.1"), ca.issue_cert("me")
    files = {name: tmp_path / name for name in ("ca", "cert", "key", "my-cert", "my-key", "token")}
    ca.cert_pem.write_to_path(files["ca"])
    theirs.cert_chain_pems[0].write_to_path(files["cert"])
    theirs.private_key_pem.write_to_path(files["key"])
    mine.cert_chain_pems[0].write_to_path(files["my-cert"])
    mine.private_key_pem.write_to_path(files["my-key"])
    files["token"].write_text("# of the tests\n\na-token-of-the-tests\nanother-of-the-tests\n")
    files["token"].chmod(0o600)
    _, _, address = await start_server(
        tls_cert=files["cert"],
        tls_key=files["key"],
        tls_client_ca=files["ca"],
        token_file=files["token"],
    )
    flags = ["x", "--target", address, "--max-new-tokens", "2", "--timeout", "10"]
    tls = [*flags, "--tls-ca", str(files["ca"])]
    own = [*tls, "--tls-cert", str(files["my-cert"]), "--tls-key", str(files["my-key"])]
    code, _, err = await run(*own, "--token-file", str(files["token"]))
    assert (code, err) == (0, "")
    code, _, err = await run(*own)
    assert code == 1
    assert "bearer token" in err
    halved = [*tls, "--tls-cert", str(files["my-cert"])]
    for wrong, exits in ((flags, 1), (tls, 1), (halved, 2)):
        code, _, err = await run(*wrong, "--token-file", str(files["token"]))
        assert code == exits
        assert err.startswith("error: ")
    files["token"].write_text("# none\n")
    code, _, err = await run(*own, "--token-file", str(files["token"]))
    assert (code, "holds no token" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "exits", "message"),
    [
        (["--table", "mathqa"], 1, "no alpha table 'mathqa'; served: none"),
        (["--budget", "65"], 1, "at most 64 slots"),
        (["--alpha", "1.5"], 2, "less than or equal to 1"),
        (["--alpha", "0.5", "--preset", "h2o"], 2, "at most one of preset, table, alpha"),
        (["--max-new-tokens", "0"], 1, "greater than or equal to 1"),
        (["--max-new-tokens", "-1"], 2, "out of range"),
        (["--max-new-tokens", "900000", "--ignore-eos", "--timeout", "0.2"], 1, "0.2 s"),
        (["--target", "a:1,b:2"], 2, "'a:1' in a list"),
        (["--target", "127.0.0.1:1,127.0.0.1:2", "--tls"], 2, "tls.server_name: missing"),
        (["--tls-cert", __file__, "--tls-key", __file__], 2, "accepted: PEM"),
    ],
)
async def test_an_error_is_one_line_and_exits_2_if_no_call_was_made(
    start_server: StartServer, arguments: list[str], exits: int, message: str
) -> None:
    _, _, address = await start_server()
    code, _, err = await run("x", "--target", address, *arguments)
    assert code == exits
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


async def test_a_missing_server_is_reported_in_one_line() -> None:
    code, out, err = await run("x", "--target", "127.0.0.1:1", "--timeout", "10")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "127.0.0.1:1" in err


async def test_a_closed_stdout_ends_the_client_quietly(start_server: StartServer) -> None:
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
    await until(lambda: not server.num_calls)


async def test_live_figures_are_shown_only_on_a_terminal(start_server: StartServer) -> None:
    _, _, address = await start_server()
    flags = ["x", "--target", address, "--max-new-tokens", "400", "--ignore-eos"]
    ours, theirs = pty.openpty()
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service.client", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    drawn: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                drawn.append(chunk)

    async with asyncio.timeout(WAIT_S):
        reading = asyncio.create_task(asyncio.to_thread(read))
        out, _ = await client.communicate()
        await reading
    os.close(ours)
    assert client.returncode == 0
    assert out.count(b"tokens/s") == 1
    assert out.rstrip(b"\n").rsplit(b"\n", 1)[1].startswith(b"400 tokens (length)")
    assert b"tokens/s, evicted " in b"".join(drawn)


@pytest.mark.parametrize("module", ["service.client", "service.client.terminal.cli"])
def test_a_client_loads_no_engine(module: str) -> None:
    heavy = {
        "torch",
        "transformers",
        "optuna",
        "numpy",
        "a2sf.engine.engine",
        "service.backend.loading",
    }
    code = f"import sys, {module}; sys.exit(' '.join({heavy!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], timeout=WAIT_S, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
