"""Opens channels to a server: address, encryption, token, load balancing.

Owns the syntax of targets (one server, a name that may resolve to several, or a list of addresses),
the options of a channel, and the rule about which targets may get a token. The channels for
asyncio and for threads are opened in the same way. Knows nothing of calls.
"""

import ipaddress
import json
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from pydantic import ConfigDict, Field

from a2sf.errors import InvalidArgument, first_line
from a2sf.validation import Given
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
    # `service.client.transport` retries.
    ("grpc.enable_retries", 0),
    *METADATA_OPTIONS,
)

_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")


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


def uri(target: str) -> str:
    """Convert a target to gRPC's syntax: a list of addresses gets the scheme of its IP version.

    Raises InvalidArgument for a list with anything but IP addresses of one version.
    """
    if not is_list(target):
        return target
    addresses = _addresses(target)
    families = {_family(address) for address in addresses}
    if len(families) > 1:
        # gRPC has no scheme for a mixed list.
        raise InvalidArgument("target", f"{target} mixes IPv4 and IPv6; give addresses of one kind")
    return f"ipv{families.pop()}:{','.join(addresses)}"


def is_list(target: str) -> bool:
    """Whether a target lists several addresses."""
    return len(_addresses(target)) > 1


def may_be_several(target: str) -> bool:
    """Whether a target is a list, or a name that may resolve to several addresses."""
    hosts = _hosts(target)
    return len(hosts) > 1 or any(host != "localhost" and not _is_ip(host) for host in hosts)


def is_local(target: str) -> bool:
    """Whether data sent to a target never leaves this machine."""
    return all(host == "localhost" or _is_loopback(host) for host in _hosts(target))


def _addresses(target: str) -> list[str]:
    """Return the addresses of a target as HOST:PORT; empty for a Unix socket."""
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return []
    if scheme == "dns":
        # dns://resolver/host:port or dns:host:port
        return [rest.rpartition("/")[2]]
    if scheme in ("ipv4", "ipv6"):
        return rest.split(",")
    return [target] if scheme in _SCHEMES else target.split(",")


def _hosts(target: str) -> list[str]:
    return [urlsplit(f"//{address}").hostname or address for address in _addresses(target)]


def _family(address: str) -> int:
    """Return 4 or 6. Raises InvalidArgument if `address` is not IP:PORT."""
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    version = ipaddress.ip_address(bare).version if _is_ip(bare) else None
    if version != (4 if bare == host else 6) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidArgument(
            "target",
            f"{address!r} in a list; accepted: 10.0.0.7:50051, [fd00::7]:50051. Give a name of "
            "several servers alone, as dns:///NAME:PORT",
        )
    return version


def _is_loopback(host: str) -> bool:
    return _is_ip(host) and ipaddress.ip_address(host).is_loopback


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
