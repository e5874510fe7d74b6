"""A gRPC port: its server, health, reflection, and credentials.

Owns the options of gRPC and how a port is bound. Knows nothing of what the services do.
"""

import socket
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from a2sf.errors import InvalidArgument
from service.rpc.health_servicer import HealthServicer
from service.status import METADATA_OPTIONS

GRPC_OPTIONS = (
    # By default, a second server can bind the same port and then gets half of the calls.
    ("grpc.so_reuseport", 0),
    # Clients may ping once a second while no data is sent to them, as when a request waits. gRPC
    # closes the connection, with all its calls, at the third ping above the rate. We allow twice
    # the rate, because pings arrive unevenly. gRPC silently ignores the key named min_recv_ping_...
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    # If a client's machine vanishes, its row is freed only when a ping gets no answer.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default, a connection on which the peer speaks no HTTP/2 stays open for two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Responses are under our control, and one with all logprobs exceeds the usual 4 MiB.
    ("grpc.max_send_message_length", -1),
    *METADATA_OPTIONS,
)


class Listener:
    """One gRPC server on one port. Create and use it in one event loop."""

    def __init__(
        self,
        services: Sequence[str],
        *,
        credentials: grpc.ServerCredentials | None,
        interceptors: "Sequence[grpc.aio.ServerInterceptor[Any, Any]]",
        max_message_bytes: int,
    ) -> None:
        """Create the server with health and reflection for `services`, which the caller adds.

        Without `credentials`, the port is plain text.
        """
        self.server = grpc.aio.server(
            interceptors=interceptors,
            options=(*GRPC_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)),
        )
        self.health = HealthServicer(services)
        self._credentials = credentials
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        reflection.enable_server_reflection(
            (*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server
        )

    async def bind(self, address: str, flag: str) -> int:
        """Listen on `address`, HOST:PORT, with health NOT_SERVING; return the port.

        Raises InvalidArgument with `flag`, the flag of the port, if that fails.
        """
        check_free(address, flag)
        await self.health.set_all(serving=False)
        try:
            port = (
                self.server.add_insecure_port(address)
                if self._credentials is None
                else self.server.add_secure_port(address, self._credentials)
            )
        except RuntimeError:
            raise InvalidArgument(flag, f"cannot listen on {address}") from None
        await self.server.start()
        return int(port)

    async def stop(self, flush_s: float) -> None:
        """Stop listening, and end the remaining calls after `flush_s` seconds."""
        await self.health.drain()
        self.health.end()
        await self.server.stop(flush_s)


def check_free(address: str, flag: str) -> None:
    """Try to bind the address with a plain socket, because grpc only logs why it fails."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:
        raise InvalidArgument(flag, f"cannot listen on {address}: {error.strerror}") from error
