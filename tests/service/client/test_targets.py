"""Targets of a client, and their conversion to gRPC's syntax."""

import pytest

from a2sf.errors import InvalidArgument
from service.client.targets import uri


@pytest.mark.parametrize(
    ("target", "taken"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("a2sf.example:50051", "a2sf.example:50051"),
        ("dns:///a2sf:50051", "dns:///a2sf:50051"),
        ("10.0.0.7:1,10.0.0.8:2", "ipv4:10.0.0.7:1,10.0.0.8:2"),
        ("ipv4:10.0.0.7:1,10.0.0.8:2", "ipv4:10.0.0.7:1,10.0.0.8:2"),
        ("[fd00::7]:1,[fd00::8]:2", "ipv6:[fd00::7]:1,[fd00::8]:2"),
        ("ipv6:[fd00::7]:1,[fd00::8]:2", "ipv6:[fd00::7]:1,[fd00::8]:2"),
    ],
)
def test_a_list_is_converted_to_grpc_syntax(target: str, taken: str) -> None:
    assert uri(target) == taken


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("a2sf-1:50051,a2sf-2:50051", "'a2sf-1:50051' in a list; .* dns:///NAME:PORT"),
        ("localhost:1,localhost:2", "'localhost:1' in a list"),
        ("10.0.0.7,10.0.0.8:1", "'10.0.0.7' in a list"),
        ("10.0.0.7:1,", "'' in a list"),
        ("10.0.0.7:1, 10.0.0.8:1", "' 10.0.0.8:1' in a list"),
        ("10.0.0.7:1,10.0.0.8:0", "'10.0.0.8:0' in a list"),
        ("10.0.0.7:1,10.0.0.8:65536", "'10.0.0.8:65536' in a list"),
        ("fd00::7:1,[fd00::8]:1", "'fd00::7:1' in a list"),
        ("ipv4:10.0.0.7:1,a2sf:1", "'a2sf:1' in a list"),
        ("10.0.0.7:1,[fd00::8]:1", "mixes IPv4 and IPv6"),
    ],
)
def test_an_invalid_list_is_refused_by_name(target: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        uri(target)
