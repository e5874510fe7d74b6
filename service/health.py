"""Ask a server's health: `python -m service.health --target HOST:PORT`, for containers' checks.

Exit code 0 where it is SERVING, 1 otherwise, with one line either way. Loads no more than it
needs, for it runs every few seconds.
"""

from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def check(
    target: Annotated[str, typer.Option(help="The server, HOST:PORT.")] = "127.0.0.1:50051",
    service: Annotated[str, typer.Option(help="A service's full name; empty for all.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 5.0,
) -> None:
    """Tell whether a server serves."""
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        with grpc.insecure_channel(target) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
    except grpc.RpcError as error:
        typer.echo(f"{target}: {error.code().name}", err=True)
        raise typer.Exit(1) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    typer.echo(f"{target}: {status}")
    raise typer.Exit(0 if status == "SERVING" else 1)


if __name__ == "__main__":
    app()
