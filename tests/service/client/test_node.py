"""The client in Node with two servers."""

from pathlib import Path

import pytest

from a2sf.errors import A2SFError, ResourceExhausted, Unavailable
from tests.service.test_languages import example, node, standing

__all__ = ["example"]  # A fixture, which pytest finds here.


@pytest.mark.slow
@pytest.mark.parametrize("error", [Unavailable("starting"), ResourceExhausted("full")])
async def test_the_node_client_tries_the_next_server_if_one_is_full(
    example: Path, error: A2SFError
) -> None:
    async with standing(error, refusals=100) as (_, one), standing(error, 0) as (other, two):
        target = f"ipv4:{one},{two}".replace("localhost", "127.0.0.1")
        code, out, err = await node(example, "at last", "--target", target)
    assert (code, out) == (0, "at last\n"), err
    assert len(other.authorizations) == 1
