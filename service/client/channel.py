"""Opens channels to a server: address, encryption, token, load balancing.

Owns the options of a channel and the rule about which targets may get a token. The channels for
asyncio and for threads are opened in the same way. Knows nothing of calls.
"""

import json
import ssl
from pathlib import Path
from typing import Any

import grpc
from pydantic import ConfigDict, Field

from a2sf.errors import InvalidArgument, first_line
from a2sf.validation import Given
from service.client.targets import is_list, is_local, may_be_several, uri
from service.pb import inference_pb2 as pb
from service.status import METADATA_OPTIONS

INFERENCE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

BALANCING: dict[str, Any] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": INFERENCE},
}
"""For a target with several addresses: round robin over servers whose health is SERVING."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # Distinguishes a vanished machine from a slow server. Our server allows pings every second.
    # Without the last option, pings stop while a long prompt sends no data.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A table, or a completion with its logprobs, may exceed the default of 4 MiB.
    ("grpc.max_receive_message_length", -1),
    # A server that comes back is found within this time; the default is up to two minutes.
    ("grpc.max_reconnect_backoff_ms", 10_000),
    # `service.client.rounds` retries.
    ("grpc.enable_retries", 0),
    *METADATA_OPTIONS,
)


class Tls(Given):
    """TLS settings of a channel. All files are PEM."""

    root_ca: Path | None = None
    """Trusted CA certificates; None: the public ones that come with gRPC."""
    cert: Path | None = None
    """The client's certificate chain, if the server requires one; needs `key`."""
    key: Path | None = None
    server_name: str | None = None
    """Name in the server's certificate, if it differs from the target's name. For a list of
    addresses, which has no name: the one name in the certificates of all its servers."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises InvalidArgument with the file that cannot be used."""
        if (self.cert is None) != (self.key is None):
            raise InvalidArgument("tls", "give both cert and key, or neither")
        # gRPC accepts any bytes as PEM, and then fails each call with an unclear error.
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
            # With a password argument, so that OpenSSL does not ask for one.
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
    """Settings of a connection, besides the address."""

    model_config = ConfigDict(hide_input_in_errors=True)

    token: str | None = Field(default=None, repr=False)
    """Sent with each call as `authorization: Bearer`."""
    tls: Tls | None = None
    """None: plain text."""
    insecure_token: bool = False
    """Whether the token may leave this machine in plain text; for trusted networks, or networks
    that are encrypted at a lower layer."""

    def metadata(self, target: str) -> tuple[tuple[str, str], ...]:
        """Return the metadata of each call.

        Raises InvalidArgument for a token that would leave this machine in plain text, or that
        cannot be a header; the error never contains the token.
        """
        if self.token is None:
            return ()
        if not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise InvalidArgument("token", "accepted: printable ASCII without spaces")
        if not self.token:
            raise InvalidArgument("token", "empty; give a token, or leave it out")
        if self.tls is None and not self.insecure_token and not is_local(target):
            raise InvalidArgument(
                "token",
                f"plain text to {target} would show the token to others; use TLS, or set "
                "insecure_token if the network is trusted",
            )
        return (("authorization", f"Bearer {self.token}"),)

    def settings(self, target: str, *, balanced: bool) -> list[tuple[str, Any]]:
        """Return the gRPC options of the channel; `balanced`: any of several servers may answer.

        Raises InvalidArgument for a list of servers if `balanced` is False, and for a list with TLS
        but without `tls.server_name`.
        """
        if is_list(target) and not balanced:
            raise InvalidArgument(
                "target", f"{target} lists several servers; create one admin client for each"
            )
        # With one address there is no other server to try. Ask it directly, so that its own error
        # says what is wrong.
        settings: list[tuple[str, Any]] = [*CHANNEL_OPTIONS]
        if balanced and may_be_several(target):
            settings.append(("grpc.service_config", json.dumps(BALANCING)))
        if self.tls is not None and self.tls.server_name is not None:
            settings.append(("grpc.ssl_target_name_override", self.tls.server_name))
        elif self.tls is not None and is_list(target):
            raise InvalidArgument(
                "tls.server_name",
                f"missing, and the list {target} has no name; give the name that the certificates "
                "of all its servers share",
            )
        return settings


PLAIN_TEXT = ChannelOptions()
"""No encryption and no token, for a server on this machine."""


def open_aio(target: str, options: ChannelOptions, *, balanced: bool) -> grpc.aio.Channel:
    """Open a channel in the running event loop. It connects at the first call."""
    address, settings = uri(target), options.settings(target, balanced=balanced)
    if options.tls is None:
        return grpc.aio.insecure_channel(address, settings)
    return grpc.aio.secure_channel(address, options.tls.credentials(), settings)


def open_sync(target: str, options: ChannelOptions, *, balanced: bool) -> grpc.Channel:
    """Open a channel for threads. It connects at the first call."""
    address, settings = uri(target), options.settings(target, balanced=balanced)
    if options.tls is None:
        return grpc.insecure_channel(address, settings)
    return grpc.secure_channel(address, options.tls.credentials(), settings)
