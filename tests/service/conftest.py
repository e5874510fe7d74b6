"""Servers for the tests: in this process on a real port, or as a separate process."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from service.backend.loading import Core, load_core
from service.client import Client
from service.config.options import ServerOptions
from service.server import Server
from tests.tiny import save_tiny_llama

START_TIMEOUT_S = 60.0
WAIT_S = 30.0

ENDLESS: dict[str, Any] = {"max_new_tokens": 900_000, "ignore_eos": True}
"""A completion that outlasts every test on the long model."""


async def until(condition: Callable[[], bool]) -> None:
    """Look again until `condition` holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


StartServer = Callable[..., Awaitable[tuple[Server, Client, str]]]
StartProcess = Callable[..., "ServerProcess"]


@pytest.fixture(scope="session")
def long_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with so long a context that its completions never end by themselves."""
    return save_tiny_llama(tmp_path_factory.mktemp("long"), max_position_embeddings=10**6)


@pytest.fixture
async def start_server(long_model_dir: Path) -> AsyncIterator[StartServer]:
    """Start servers in this process; returns each with a client and its address."""
    async with AsyncExitStack() as stack:

        async def start(
            load: Callable[[ServerOptions], Core] = load_core, **options: Any
        ) -> tuple[Server, Client, str]:
            settings = {
                "model": str(long_model_dir),
                "port": 0,
                "device": "cpu",
                "slots": 64,
                "default_budget": 32,
                "max_batch": 2,
                **options,
            }
            server = Server(ServerOptions(**settings), load)
            port = await server.bind()
            stack.push_async_callback(asyncio.wait_for, server.stop(), START_TIMEOUT_S)
            await asyncio.wait_for(server.warm(), START_TIMEOUT_S)
            address = f"127.0.0.1:{port}"
            client = await stack.enter_async_context(Client(address))
            return server, client, address

        yield start


class ServerProcess:
    """`python -m service` as a user runs it."""

    def __init__(
        self, directory: Path, arguments: tuple[str, ...], program: tuple[str, ...]
    ) -> None:
        self._port_file = directory / "port"
        self._log_path = directory / "server.log"
        self._log = self._log_path.open("w")
        self.process = subprocess.Popen(
            [sys.executable, *program, "--port-file", str(self._port_file), *arguments],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    async def address(self) -> str:
        """Where it serves, once it does."""
        await self.until(self._port_file.exists)
        return f"127.0.0.1:{int(self._port_file.read_text())}"

    async def logged(self, text: str) -> None:
        await self.until(lambda: text in self.log)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Look again until `condition` holds; fail if the process ends or time is up first."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while not condition():
                assert self.process.poll() is None, self.log
                await asyncio.sleep(0.05)

    async def ended(self) -> int:
        """Wait for its end; return the exit code."""
        return await asyncio.to_thread(self.process.wait, START_TIMEOUT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(START_TIMEOUT_S)
        self._log.close()


@pytest.fixture
def start_process(tmp_path: Path, long_model_dir: Path) -> Iterator[StartProcess]:
    """Start servers as processes."""
    started: list[ServerProcess] = []

    def start(*arguments: str, program: tuple[str, ...] = ("-m", "service")) -> ServerProcess:
        process = ServerProcess(
            tmp_path,
            (
                *("--model", str(long_model_dir), "--port", "0", "--device", "cpu"),
                *("--slots", "64", "--default-budget", "32", "--max-batch", "1"),
                *arguments,
            ),
            program,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.close()
