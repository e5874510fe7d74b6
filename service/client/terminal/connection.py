"""The flags of a connection to a server, shared by the commands.

Owns the flags, and how they become `ChannelOptions`. Knows nothing of calls.
"""

from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from a2sf.errors import A2SFError, InvalidArgument
from service.client.channel import ChannelOptions, Tls


def server_option(*names: str, **settings: Any) -> Any:
    """Return an option in the help's section of the server."""
    return typer.Option(*names, rich_help_panel="Server", **settings)


_FILE: dict[str, Any] = {"exists": True, "dir_okay": False, "readable": True, "metavar": "FILE"}

TokenFile = Annotated[
    Path | None, server_option(help="File with the bearer token for the server.", **_FILE)
]
InsecureToken = Annotated[
    bool,
    server_option("--insecure-token", help="Send the token even in plain text to another machine."),
]
UseTls = Annotated[
    bool, server_option("--tls", help="Encrypt, and trust the public certificate authorities.")
]
TlsCa = Annotated[
    Path | None, server_option(help="Encrypt, and trust these certificates (PEM).", **_FILE)
]
TlsCert = Annotated[Path | None, server_option(help="The client's certificate (PEM).", **_FILE)]
TlsKey = Annotated[Path | None, server_option(help="Private key (PEM) of --tls-cert.", **_FILE)]
ServerName = Annotated[
    str | None,
    server_option(help="Name in the server's certificate, if the target has another or none."),
]


def channel_options(
    *,
    token_file: Path | None,
    insecure_token: bool,
    tls: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    server_name: str | None,
) -> ChannelOptions:
    """Build the options of a channel. Raises InvalidArgument for a file without a token."""
    encrypted = tls or tls_ca or tls_cert or tls_key
    if server_name is not None and not encrypted:
        raise typer.BadParameter("--server-name needs --tls or --tls-ca")
    return ChannelOptions(
        token=_first_token(token_file) if token_file else None,
        insecure_token=insecure_token,
        tls=Tls(root_ca=tls_ca, cert=tls_cert, key=tls_key, server_name=server_name)
        if encrypted
        else None,
    )


def exit_code(error: A2SFError) -> int:
    """Return 2 if the client itself refused a value, else 1: the call failed."""
    refused_here = isinstance(error, InvalidArgument) and not isinstance(
        error.__cause__, grpc.RpcError
    )
    return 2 if refused_here else 1


def _first_token(path: Path) -> str:
    """Read a file in the server's format: one token per line, blank lines, and # comments."""
    # Invalid UTF-8 becomes an invalid token, and is refused as such.
    for line in path.read_text(errors="replace").splitlines():
        if line.strip() and not line.startswith("#"):
            return line.strip()
    raise InvalidArgument("--token-file", f"{path} holds no token")
