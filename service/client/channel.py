"""How a client reaches a server: address, encryption, token, retries, balancing.

Owns the settings of a channel and the rule of where a token may go. Both kinds of channel, of
asyncio and of threads, are opened here, alike. Knows nothing of calls.
"""

import json
import ssl
from pathlib import Path
from typing import Any

import grpc
from pydantic import ConfigDict, Field

from a2sf.errors import InvalidArgument, first_line
from a2sf.schema import Given
from service.client.targets import is_list, may_be_several, stays_here, uri
from service.pb import inference_pb2 as pb
from service.status import METADATA_OPTIONS

INFERENCE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
MODEL = pb.DESCRIPTOR.services_by_name["ModelService"].full_name
ADMIN = pb.DESCRIPTOR.services_by_name["AdminService"].full_name

RETRIES: dict[str, Any] = {
    "methodConfig": [
        {
            # Of the admin calls only the one that changes nothing: whether a lost call took
            # effect is for the caller to find out.
            "name": [
                {"service": INFERENCE},
                {"service": MODEL},
                {"service": ADMIN, "method": "GetLoad"},
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # Every failed attempt takes one of these, every success gives one back, and below half of them
    # nothing is retried: servers that are down are not stormed. The most that gRPC allows, for a
    # server that dies fails all its calls at once, and each of them may need another server.
    "retryThrottling": {"maxTokens": 1000, "tokenRatio": 1},
}
"""What gRPC retries by itself: calls that failed before anything of their answer arrived. What
found no room is for `service.client.rounds`."""

BALANCING: dict[str, Any] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": INFERENCE},
}
"""For a target of several addresses: in turn to those whose health says SERVING."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A server whose machine vanished is told from one that thinks for long. The server allows
    # pings each second; without the last line they end where a long prompt sends nothing.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A table, or a completion with its logprobs, may pass the default of 4 MiB.
    ("grpc.max_receive_message_length", -1),
    # A server that comes back is found within that; by default it may take two minutes.
    ("grpc.max_reconnect_backoff_ms", 10_000),
    # What is larger is never tried again, by default 256 KiB; a prompt may have a MiB and more.
    ("grpc.per_rpc_retry_buffer_size", 16 * 2**20),
    *METADATA_OPTIONS,
)


class Tls(Given):
    """How a channel is encrypted. All files are PEM."""

    root_ca: Path | None = None
    """Certificates to trust; None: those that gRPC brings, the public authorities."""
    cert: Path | None = None
    """The client's own certificate chain, where the server asks for one; needs `key`."""
    key: Path | None = None
    server_name: str | None = None
    """Name that the server's certificate must bear, where it is not the target's own. A list of
    addresses has none: its servers' certificates all bear this one."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises InvalidArgument that names the file which cannot be used."""
        if (self.cert is None) != (self.key is None):
            raise InvalidArgument("tls", "cert and key are given together or not at all")
        # gRPC takes anything for PEM, and then fails each call with a riddle.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        roots = None
        if self.root_ca is not None:
            try:
                context.load_verify_locations(self.root_ca)
                roots = self.root_ca.read_bytes()
            except OSError as error:
                raise InvalidArgument(
                    "tls.root_ca", f"{self.root_ca}: {_why(error, 'certificates')}"
                ) from None
        if self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(roots)
        try:
            # With a password, so that nobody is asked for one.
            context.load_cert_chain(self.cert, self.key, password="")
            chain, key = self.cert.read_bytes(), self.key.read_bytes()
        except OSError as error:
            raise InvalidArgument(
                "tls.cert",
                f"{self.cert} with key {self.key}: "
                + _why(error, "a key without a password, and a key that is the certificate's"),
            ) from None
        return grpc.ssl_channel_credentials(roots, key, chain)


def _why(error: OSError, accepted: str) -> str:
    if isinstance(error, ssl.SSLError):
        return f"accepted: PEM, {accepted}"
    return error.strerror or first_line(error)


class ChannelOptions(Given):
    """How a server is reached besides its address."""

    model_config = ConfigDict(hide_input_in_errors=True)

    token: str | None = Field(default=None, repr=False)
    """Sent with each call as `authorization: Bearer`."""
    tls: Tls | None = None
    """None: plain text."""
    insecure_token: bool = False
    """Whether the token may leave this machine in plain text, for networks that are themselves
    trusted, or encrypted below."""

    def metadata(self, target: str) -> tuple[tuple[str, str], ...]:
        """What each call carries.

        Raises InvalidArgument for a token that would leave this machine in plain text, or that
        cannot be a header; never tells it.
        """
        if self.token is None:
            return ()
        if not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise InvalidArgument("token", "accepted: printable ASCII without spaces")
        if not self.token:
            raise InvalidArgument("token", "empty; give one, or none at all")
        if self.tls is None and not self.insecure_token and not stays_here(target):
            raise InvalidArgument(
                "token",
                f"{target} is reached in plain text, where others can read the token; use TLS, or "
                "say insecure_token where the network itself is trusted",
            )
        return (("authorization", f"Bearer {self.token}"),)

    def settings(self, target: str, *, balanced: bool) -> list[tuple[str, Any]]:
        """The channel's settings as gRPC takes them; `balanced` where any server will do.

        Raises InvalidArgument for a list of servers where one is meant, and for one that is reached
        by TLS without a name to look for.
        """
        if is_list(target) and not balanced:
            raise InvalidArgument(
                "target", f"{target} lists several servers; make an admin client of each"
            )
        # One address has no other to go to: the server itself is asked, and says in its own words
        # what is wrong with it.
        config = RETRIES | BALANCING if balanced and may_be_several(target) else RETRIES
        settings: list[tuple[str, Any]] = [
            *CHANNEL_OPTIONS,
            ("grpc.service_config", json.dumps(config)),
        ]
        if self.tls is not None and self.tls.server_name is not None:
            settings.append(("grpc.ssl_target_name_override", self.tls.server_name))
        elif self.tls is not None and is_list(target):
            raise InvalidArgument(
                "tls.server_name",
                f"missing, and the list {target} has no name of its own; give the one name that "
                "the certificates of all its servers bear",
            )
        return settings


PLAIN_TEXT = ChannelOptions()
"""Without encryption or token, as a server on this machine is reached."""


def open_aio(target: str, options: ChannelOptions, *, balanced: bool) -> grpc.aio.Channel:
    """Open a channel of the running event loop. Connects with its first call."""
    address, settings = uri(target), options.settings(target, balanced=balanced)
    if options.tls is None:
        return grpc.aio.insecure_channel(address, settings)
    return grpc.aio.secure_channel(address, options.tls.credentials(), settings)


def open_sync(target: str, options: ChannelOptions, *, balanced: bool) -> grpc.Channel:
    """Open a channel for threads. Connects with its first call."""
    address, settings = uri(target), options.settings(target, balanced=balanced)
    if options.tls is None:
        return grpc.insecure_channel(address, settings)
    return grpc.secure_channel(address, options.tls.credentials(), settings)
