"""A worker answers line by line, and every failure reaches the caller."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.client import Client, Gone, Refused
from tests.benchmarks import fake_worker

SCRIPT = str(Path(fake_worker.__file__))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    made = Client([sys.executable, SCRIPT], dict(os.environ), tmp_path / "log")
    yield made
    made.end(5)


def fill(client: Client, budget: int | None = None, timeout_s: float = 30) -> dict[str, Any]:
    return client.ask(
        timeout_s, do="fill", seat="a", prompt=[1, 2, 3], batch=2, budget=budget, turn=3, room=5
    )


def test_a_seat_is_filled_and_steps_in_turns(client: Client) -> None:
    versions = client.ask(30, do="load", model="m", dtype="float32", threads=1)["versions"]
    assert versions["pytest"] == pytest.__version__
    assert versions["no-such-package"] == "not installed"
    assert fill(client) == {"prefill_s": 0.5, "kv_bytes": 1024}
    answer = client.ask(30, do="steps", seat="a", untimed=1, count=2)
    assert answer["ms"] == [2.0, 2.0]
    # After the untimed step the row holds 4 tokens, and the timed ones make it 5 and 6.
    assert answer["kv_tokens"] == 5.5


def test_output_of_libraries_is_not_part_of_the_answers(client: Client) -> None:
    fill(client)
    assert client.ask(30, do="drop", seat="a") == {}


def test_an_error_is_reported_and_the_worker_continues(client: Client) -> None:
    with pytest.raises(Refused, match="KeyError: 'layers'") as caught:
        fill(client, fake_worker.BROKEN)
    assert caught.value.supported
    with pytest.raises(Refused, match="KeyError"):
        client.ask(30, do="steps", seat="a", untimed=0, count=1)
    assert fill(client)["kv_bytes"] == 1024
    with pytest.raises(Refused, match="no room left"):
        client.ask(30, do="steps", seat="a", untimed=0, count=6)


def test_unsupported_requests_are_distinguished_from_failures(client: Client) -> None:
    with pytest.raises(Refused, match="beyond it") as caught:
        fill(client, fake_worker.UNSUPPORTED)
    assert not caught.value.supported


def test_an_unknown_command_is_an_error(client: Client) -> None:
    with pytest.raises(Refused, match="no such command: dance"):
        client.ask(30, do="dance")


def test_a_worker_that_ends_is_reported_with_its_exit_code(client: Client) -> None:
    with pytest.raises(Gone, match="exit 7"):
        fill(client, fake_worker.DYING)
    with pytest.raises(Gone, match="exit 7"):
        fill(client)


def test_a_worker_that_does_not_answer_in_time_is_ended(client: Client) -> None:
    with pytest.raises(Gone, match=r"no answer to fill within 0\.2 s"):
        fill(client, fake_worker.SILENT, timeout_s=0.2)
    with pytest.raises(Gone, match="SIGKILL"):
        fill(client)
