"""The admin commands of the client's command line, on a real admin port."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from a2sf.errors import Aborted
from a2sf.model.loader import load_model
from a2sf.tablefile import save_table
from service.client.terminal.admin import app
from tests.service.conftest import ENDLESS, WAIT_S, StartServer
from tests.tables import make_table


@pytest.fixture(autouse=True)
def _the_server_in_this_process_logs_elsewhere() -> Iterator[None]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


async def run(*arguments: str) -> tuple[int, str, str]:
    """Run the command beside this loop, which the server needs."""
    result = await asyncio.wait_for(
        asyncio.to_thread(CliRunner().invoke, app, list(arguments)), WAIT_S
    )
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


async def test_the_admin_commands_print_the_answers_of_the_server(
    start_server: StartServer, long_model_dir: Path, tmp_path: Path
) -> None:
    tables, token = tmp_path / "tables", tmp_path / "token"
    tables.mkdir()
    token.write_text("# of the operator\nan-operator-s-own-token\n")
    token.chmod(0o600)
    server, client, _ = await start_server(tables=tables, admin_port=0, admin_token_file=token)
    assert server.admin_address is not None
    target = ("--target", server.admin_address)
    connection = (*target, "--token-file", str(token))

    code, out, err = await run(*target, "load")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    async with aclosing(client.stream_generate("x", request_id="long", **ENDLESS)) as events:
        await anext(events)
        code, out, err = await run(*connection, "load")
        assert (code, err) == (0, "")
        assert json.loads(out)["admitted"] == 1
        _, out, _ = await run(*connection, "abort", "long", "nobody")
        assert json.loads(out) == {"request_ids": ["long"]}
        with pytest.raises(Aborted):
            async for _ in events:
                pass

    identity = load_model(str(long_model_dir), device="cpu").identity
    save_table(make_table(identity, name="new"), tables / "new.json")
    _, out, _ = await run(*connection, "reload")
    etag = json.loads(out)["etag"]
    assert "new" in (await client.list_alpha_tables()).tables
    _, out, _ = await run(*connection, "activate", "new", "--etag", etag)
    assert json.loads(out)["default_table"] == "new"
    code, _, err = await run(*connection, "activate", "", "--etag", etag)
    assert code == 1
    assert "changed" in err


@pytest.mark.parametrize("which", [(), ("long", "--all")])
async def test_abort_needs_either_ids_or_all(which: tuple[str, ...]) -> None:
    code, _, err = await run("abort", *which)
    assert (code, err) == (2, "error: ID: give the ids of requests, or --all\n")


@pytest.mark.parametrize(
    ("flags", "told"), [((), "--server-name needs --tls"), (("--tls-ca", "no-file"), "no-file")]
)
async def test_the_flags_of_a_connection_are_checked(flags: tuple[str, ...], told: str) -> None:
    code, _, err = await run(*flags, "--server-name", "a", "load")
    assert code == 2
    assert told in err


def test_the_word_admin_leads_to_the_admin_commands() -> None:
    command = (sys.executable, "-m", "service.client", "admin", "--help")
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "a2sf-client admin" in done.stdout
    for name in ("load", "reload", "activate", "abort"):
        assert name in done.stdout
