"""Checks a server's health: `python -m service.health --target HOST:PORT`, for containers.

Exit code 0 for SERVING, 1 otherwise, 2 for wrong options; prints one line in every case. Needs no
token. Imports little, because it runs every few seconds.
"""

from pathlib import Path
from typing import Annotated, NoReturn

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def check(
    target: Annotated[str, typer.Option(help="The server, HOST:PORT.")] = "127.0.0.1:50051",
    service: Annotated[
        str, typer.Option(help="Full name of a service; empty for the whole server.")
    ] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 5.0,
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="CA certificate (PEM) of the server; without it, plain text."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Client certificate (PEM); needs --tls-ca.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key (PEM) of --tls-cert.")] = None,
    server_name: Annotated[
        str | None,
        typer.Option(help="Name in the server's certificate, if the target has another."),
    ] = None,
) -> None:
    """Check whether a server is SERVING."""
    if (tls_cert is None) != (tls_key is None):
        _fail("give both --tls-cert and --tls-key, or neither")
    if tls_ca is None and (tls_cert is not None or server_name is not None):
        _fail("--tls-cert, --tls-key and --server-name need --tls-ca")
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        with _channel(target, tls_ca, tls_cert, tls_key, server_name) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}")
    except grpc.RpcError as error:
        typer.echo(f"{target}: {error.code().name}", err=True)
        raise typer.Exit(1) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    typer.echo(f"{target}: {status}")
    raise typer.Exit(0 if status == "SERVING" else 1)


def _channel(
    target: str, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None, name: str | None
) -> grpc.Channel:
    if tls_ca is None:
        return grpc.insecure_channel(target)
    credentials = grpc.ssl_channel_credentials(
        tls_ca.read_bytes(),
        tls_key.read_bytes() if tls_key is not None else None,
        tls_cert.read_bytes() if tls_cert is not None else None,
    )
    options = [("grpc.ssl_target_name_override", name)] if name is not None else []
    return grpc.secure_channel(target, credentials, options)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
