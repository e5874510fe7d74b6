"""docs/clients.md is correct: its programs run, and its table has every method."""

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

from a2sf.tablefile import save_table
from service.client import AdminClient, Client, GenerationOptions
from service.pb import inference_pb2 as pb
from tests.service.client.test_responses import load_with_template
from tests.service.conftest import WAIT_S, StartServer
from tests.tables import make_table

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "clients.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


async def test_the_programs_of_the_page_run(start_server: StartServer, tmp_path: Path) -> None:
    token = tmp_path / "admin-token.txt"
    token.write_text("a-token-of-the-tests\n")
    token.chmod(0o600)
    tables = tmp_path / "tables"
    tables.mkdir()
    server, client, address = await start_server(
        load_with_template, tables=tables, admin_port=0, admin_token_file=token
    )
    assert server.admin_address is not None
    save_table(make_table(server.core.model.identity, name="new"), tables / "new.json")
    # The last one reaches a server elsewhere, over TLS.
    *here, elsewhere = PROGRAMS
    assert len(here) == 4
    assert "a2sf.example" in elsewhere
    for program in here:
        code = program.replace("127.0.0.1:50051", address)
        code = code.replace("127.0.0.1:50052", server.admin_address)
        run = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-c", code),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        )
        out, err = await asyncio.wait_for(run.communicate(), WAIT_S)
        assert (run.returncode, err) == (0, b""), program
        assert out
        if "except A2SFError" in program:
            assert re.fullmatch(rb"NotFound no alpha table 'nosuch'.* [0-9a-f]{32}\n", out)
    assert (await client.list_alpha_tables()).default_table == "new"


def test_the_page_lists_every_option_of_a_completion() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", PAGE, re.MULTILINE))
    assert {*GenerationOptions.__annotations__, "max_new_tokens"} == rows.keys()
    for path in rows.values():
        message: Any = pb.GenerationInput.DESCRIPTOR
        for part in path.split("."):
            field = message.fields_by_name[part]
            message = field.message_type


def test_the_page_lists_every_client_method() -> None:
    documented = set(re.findall(r"`(\w+)\(", PAGE))
    methods = {
        name for cls in (Client, AdminClient) for name in vars(cls) if not name.startswith("_")
    }
    assert methods <= documented
