"""The server process: signals, the port file, announcements, and the exit code.

Owns the order of startup and shutdown for the command line. Knows nothing of gRPC.
"""

import asyncio
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import structlog

from a2sf.errors import A2SFError, InvalidArgument
from a2sf.model.tensor_parallel import RankLost, is_first_rank, leave
from service.backend.loading import load_follower
from service.config.options import ServerOptions
from service.server import Server

log = structlog.get_logger(__name__)

_HANDLED = (signal.SIGTERM, signal.SIGINT)

_CONNECTION_LOST = "the processes of the model lost their connection"


class Announce(Protocol):
    """Announces the state of the server to the user."""

    def __call__(self, event: str, line: str, **fields: str | int) -> None:
        """Show `line` to people, or give `event` and its fields to programs."""


async def run(options: ServerOptions, announce: Announce) -> int:
    """Serve until a signal; return the exit code, which is not 0 if the engine died.

    If several processes share the model, the first one serves and the others follow it.

    Raises the errors of startup. The first SIGTERM or SIGINT drains; the second ends the process at
    once.
    """
    if not is_first_rank():
        return _follow(options)
    stopping, has_served = asyncio.Event(), False
    before_drain: tuple[int, int] | None = None
    with _signals(stopping), _port_file(options.port_file) as write_port:
        server = Server(options)
        try:
            port = await server.bind()
            address = options.model_copy(update={"port": port}).address
            fields = {"model": options.model, "address": address}
            announce("listening", f"listening on {address}, loading {options.model}", **fields)
            if (admin := server.admin_address) is not None:
                announce("admin", f"admin on {admin}", address=admin)
            if (url := server.metrics_url) is not None:
                announce("metrics", f"metrics on {url}", url=url)
            stop_requested: asyncio.Future[Any] = asyncio.ensure_future(stopping.wait())
            warming: asyncio.Future[Any] = asyncio.ensure_future(server.warm())
            try:
                if await _first_done(stop_requested, warming) is warming:
                    warming.result()
                    write_port(port)
                    has_served = True
                    announce("serving", f"serving {options.model} on {address}", **fields)
                    await _first_done(stop_requested, server.crashed)
            finally:
                stop_requested.cancel()
                warming.cancel()
            if not server.crashed.done():
                announce("stopping", "stopping")
                before_drain = server.ended_completions
                await server.drain(options.grace_s, options.settle_s)
        finally:
            await server.stop()
    if before_drain is not None and not server.crashed.done():
        finished, unfinished = (
            now - before for now, before in zip(server.ended_completions, before_drain, strict=True)
        )
        announce(
            "stopped",
            f"stopped; completions that ended while stopping: {finished} finished, "
            f"{unfinished} unfinished",
            finished=finished,
            unfinished=unfinished,
        )
    if server.thread_left_running:
        # If a thread runs native code, a normal exit of the interpreter would abort.
        log.warning("the engine's thread is still busy; the process exits without it")
        logging.shutdown()
        os._exit(int(server.crashed.done()))
    if has_served and not server.crashed.done():
        try:
            server.core.close()
        except RankLost as error:
            log.critical(_CONNECTION_LOST, reason=str(error))
            return 1
    return int(server.crashed.done())


def _follow(options: ServerOptions) -> int:
    """Compute this process's part until the first process ends; return the exit code."""
    try:
        follower = load_follower(options)
        # All processes get the signal: the first one drains, and then ends the others.
        for number in _HANDLED:
            signal.signal(number, signal.SIG_IGN)
        follower.run()
        leave()
    except RankLost as error:
        log.critical(_CONNECTION_LOST, reason=str(error))
        return 1
    except A2SFError as error:
        log.critical("a process of the model cannot start or run", reason=str(error))
        return 2
    return 0


async def _first_done(
    first: "asyncio.Future[Any]", second: "asyncio.Future[Any]"
) -> "asyncio.Future[Any]":
    done, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
    return done.pop()


@contextmanager
def _signals(stopping: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stopping.is_set():
            # The second signal: the sender does not want to wait any longer.
            os._exit(128 + number)
        stopping.set()

    for number in _HANDLED:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in _HANDLED:
            loop.remove_signal_handler(number)


@contextmanager
def _port_file(path: Path | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that writes the port atomically; the file exists only while serving.

    Raises InvalidArgument if the file cannot be written.
    """

    def write(port: int) -> None:
        if path is None:
            return
        with (
            _port_file_errors(path),
            tempfile.NamedTemporaryFile(
                "w", dir=path.parent, prefix=f".{path.name}.", delete=False
            ) as file,
        ):
            file.write(f"{port}\n")
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)

    if path is not None:
        if not path.parent.is_dir():
            raise InvalidArgument("--port-file", f"{path.parent}: no such directory")
        # A file from a killed server would send clients to a wrong port.
        with _port_file_errors(path):
            path.unlink(missing_ok=True)
    try:
        yield write
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


@contextmanager
def _port_file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArgument("--port-file", f"{path}: {error.strerror}") from error
