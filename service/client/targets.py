"""Parses targets: one server, a name that may resolve to several, or a list of addresses.

Owns parsing, and conversion to gRPC's syntax. Knows nothing of channels.
"""

import ipaddress
from urllib.parse import urlsplit

from a2sf.errors import InvalidArgument

_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")


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
