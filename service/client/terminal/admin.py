"""The command line of the admin service: `a2sf-client admin`.

Owns its commands, which print what the server answers as one line of JSON. Errors and exit codes
are those of a completion.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from a2sf.errors import A2SFError, InvalidArgument
from service.client.calls import DESCRIBE_TIMEOUT_S
from service.client.channel import ChannelOptions
from service.client.sync import SyncAdminClient
from service.client.terminal.connection import (
    InsecureToken,
    ServerName,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    UseTls,
    channel_options,
    exit_code,
    server_option,
)
from service.client.terminal.display import report_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@dataclass(frozen=True)
class _Connection:
    target: str
    options: Callable[[], ChannelOptions]
    timeout_s: float


@app.callback()
def connect(
    context: typer.Context,
    target: Annotated[
        str, server_option(help="The admin port of one server, HOST:PORT.")
    ] = "127.0.0.1:50052",
    timeout: Annotated[
        float, server_option(help="Deadline of the call, in seconds.")
    ] = DESCRIBE_TIMEOUT_S,
    token_file: TokenFile = None,
    insecure_token: InsecureToken = False,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    server_name: ServerName = None,
) -> None:
    """Administer one server by its admin port; give these options before the command."""
    context.obj = _Connection(
        target,
        lambda: channel_options(
            token_file=token_file,
            insecure_token=insecure_token,
            tls=tls,
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
            server_name=server_name,
        ),
        timeout,
    )


@app.command()
def load(context: typer.Context) -> None:
    """Print how many requests run and wait, and the memory in use."""
    _call(context, lambda client, timeout_s: client.get_load(timeout_s=timeout_s))


@app.command()
def reload(context: typer.Context) -> None:
    """Read the directory of alpha tables again; print the changes, and the etag for activate."""
    _call(context, lambda client, timeout_s: client.reload_alpha_tables(timeout_s=timeout_s))


@app.command()
def activate(
    context: typer.Context,
    table: Annotated[str, typer.Argument(help='Name of the table; "" for none.')],
    etag: Annotated[str, typer.Option(help="The state of the tables, as reload prints it.")],
) -> None:
    """Make TABLE the default table, unless the tables have changed since the etag."""
    _call(
        context,
        lambda client, timeout_s: client.activate_alpha_table(
            table or None, etag=etag, timeout_s=timeout_s
        ),
    )


@app.command()
def abort(
    context: typer.Context,
    request_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Ids of requests.")
    ] = None,
    all_requests: Annotated[bool, typer.Option("--all", help="End all requests.")] = False,
) -> None:
    """End requests, by id or all; print the ids of those that were under way."""

    def call(client: SyncAdminClient, timeout_s: float) -> object:
        if bool(request_ids) == all_requests:
            raise InvalidArgument("ID", "give the ids of requests, or --all")
        ids = client.abort_requests(
            request_ids or (), all_requests=all_requests, timeout_s=timeout_s
        )
        return {"request_ids": ids}

    _call(context, call)


def _call(context: typer.Context, call: Callable[[SyncAdminClient, float], Any]) -> None:
    """Print the answer of `call` as JSON, or its error in one line, with the exit code for it."""
    connection: _Connection = context.obj
    try:
        with SyncAdminClient(connection.target, connection.options()) as client:
            answer = call(client, connection.timeout_s)
    except A2SFError as error:
        report_line(error)
        raise typer.Exit(exit_code(error)) from None
    shown = answer.model_dump(mode="json") if isinstance(answer, BaseModel) else answer
    typer.echo(json.dumps(shown))
