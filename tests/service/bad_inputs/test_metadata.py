"""Metadata has one limit: below it is always accepted, above it never."""

import asyncio

import grpc
import pytest

from a2sf.errors import InvalidArgument
from service.client import ChannelOptions, Client, SyncClient
from service.status import MAX_METADATA_BYTES
from tests.service.bad_inputs.conftest import GOOD, Served, read

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRIES = 20
"""By its defaults gRPC refuses half of what is half-way between its two limits."""

OURS_BYTES = 1024
"""More than what gRPC itself puts into a call's metadata."""


@pytest.mark.parametrize("size", [8_192, 12_000, MAX_METADATA_BYTES - OURS_BYTES])
async def test_metadata_below_the_limit_is_always_accepted(served: Served, size: int) -> None:
    for _ in range(TRIES):
        await served.call(GOOD, metadata=[("x-large", "m" * size)])


@pytest.mark.parametrize("size", [MAX_METADATA_BYTES, 2 * MAX_METADATA_BYTES])
async def test_metadata_above_the_limit_is_never_accepted(served: Served, size: int) -> None:
    for _ in range(TRIES):
        status = read(await served.refusal(GOOD, metadata=[("x-large", "m" * size)]))
        assert (status.code, status.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, None)
        assert (
            f"metadata size exceeds hard limit (value length {size} vs. {MAX_METADATA_BYTES}"
            in (status.details)
        )


async def test_the_client_distinguishes_large_metadata_from_a_full_server(
    served: Served,
) -> None:
    options = ChannelOptions(token="t" * MAX_METADATA_BYTES)
    large = pytest.raises(InvalidArgument, match=r"metadata: .* exceeds hard limit")
    async with Client(served.address, options) as client:
        with large:
            await client.get_model()
    with SyncClient(served.address, options) as blocking, large:
        await asyncio.to_thread(blocking.get_model)
