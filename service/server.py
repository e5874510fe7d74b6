"""The server's life: bind, load, warm, serve, drain, end.

Owns the gRPC server and its settings, health, reflection, signals and the port file. The port is
bound first, so that a taken one is told before a model is loaded; until the engine is warm, health
says NOT_SERVING and calls are UNAVAILABLE. Knows nothing of what requests mean.
"""

import asyncio
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from a2sf.errors import InvalidArgument, Unavailable
from a2sf.policy import CachePolicy
from a2sf.requests import GenerationRequest
from service.core import Core, load_core
from service.gate import Gate
from service.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.runner import EngineRunner
from service.servicers import Backend, InferenceServicer, ModelServicer

log = logging.getLogger(__name__)

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())

GRPC_OPTIONS = (
    # By default a second server may bind the same port, and gets half of the calls.
    ("grpc.so_reuseport", 0),
    # Clients may keep a connection alive; the key named min_recv_ping_... is silently ignored.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # A client whose machine vanished holds its row until a ping goes unanswered.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

FLUSH_S = 2.0
"""Time for statuses already decided to reach their clients before connections are closed."""


class Server:
    """One gRPC server around one engine. Made and used in one event loop."""

    def __init__(self, options: ServerOptions, load: Callable[[ServerOptions], Core] = load_core):
        self._options = options
        self._load = load
        self._gate = Gate()
        self._runner = EngineRunner()
        self._backend = Backend(self._gate, self._runner)
        self._health = _Health()
        self.left_behind = False
        self._server = grpc.aio.server(options=GRPC_OPTIONS)
        pb_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(self._backend), self._server
        )
        pb_grpc.add_ModelServiceServicer_to_server(ModelServicer(self._backend), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    @property
    def core(self) -> Core:
        """What is served, once loaded."""
        return self._backend.core

    @property
    def inside(self) -> int:
        """Calls under way."""
        return self._gate.inside

    @property
    def crashed(self) -> "asyncio.Future[BaseException]":
        """Done once the engine has died; all that is left then is `stop`."""
        return self._runner.crashed

    async def bind(self) -> int:
        """Listen, not yet serving; return the port. Raises InvalidArgument where that fails."""
        address = self._options.address
        _check_free(self._options.host, self._options.port)
        await self._health.set_all(serving=False)
        try:
            port: int = self._server.add_insecure_port(address)
        except RuntimeError:
            raise InvalidArgument("port", f"cannot listen on {address}") from None
        await self._server.start()
        return port

    async def warm(self) -> None:
        """Load, make one tiny completion, and serve. Raises what loading raises."""
        self._backend.core = await self._runner.start(partial(self._load, self._options))
        # Two new tokens, so that a decode step is run; preset full needs no budget.
        request = GenerationRequest(
            request_id="warm-up",
            prompt_ids=(0,),
            max_new_tokens=2,
            ignore_eos=True,
            cache_policy=CachePolicy(preset="full"),
        )
        async with aclosing(self._runner.stream(request)) as events:
            async for _ in events:
                pass
        self._gate.open()
        await self._health.set_all(serving=True)

    async def drain(self, grace_s: float) -> None:
        """Take no more calls, and let those inside finish within `grace_s` seconds."""
        self._gate.close("the server is shutting down")
        await self._health.drain()
        try:
            await asyncio.wait_for(self._gate.emptied(), grace_s)
        except TimeoutError:
            log.warning("%d calls did not finish within %g s", self._gate.inside, grace_s)

    async def stop(self) -> None:
        """End every call with a status, then the server and the engine's thread.

        `left_behind` tells afterwards whether that thread would not end.
        """
        self._gate.close("the server is shutting down")
        await self._health.drain()
        if not self.crashed.done():
            self._runner.fail_all(lambda: Unavailable("the server is shutting down"))
        await self._server.stop(FLUSH_S)
        self.left_behind = not await self._runner.stop(FLUSH_S)


async def run(options: ServerOptions, announce: Callable[[str], None]) -> int:
    """Serve until told to stop; return the process's exit code, not 0 if the engine died.

    `announce` is given lines for the user. Raises what starting raises. The first SIGTERM or
    SIGINT drains, the second ends the process at once.
    """
    stopping = asyncio.Event()
    with _signals(stopping), _port_file(options.port_file) as write_port:
        server = Server(options)
        port = await server.bind()
        address = options.model_copy(update={"port": port}).address
        announce(f"listening on {address}, loading {options.model}")
        told: asyncio.Future[Any] = asyncio.ensure_future(stopping.wait())
        warming: asyncio.Future[Any] = asyncio.ensure_future(server.warm())
        try:
            if await _either(told, warming) is warming:
                warming.result()
                write_port(port)
                announce(f"serving {options.model} on {address}")
                await _either(told, server.crashed)
        except BaseException:
            await server.stop()
            raise
        finally:
            told.cancel()
            warming.cancel()
        if not server.crashed.done():
            announce("stopping")
            await server.drain(options.grace_s)
        await server.stop()
    if server.left_behind:
        # A thread inside native code would turn an ordinary exit of the interpreter into an abort.
        log.warning("the engine's thread is still busy and is left behind")
        logging.shutdown()
        os._exit(int(server.crashed.done()))
    return int(server.crashed.done())


async def _either(
    first: "asyncio.Future[Any]", second: "asyncio.Future[Any]"
) -> "asyncio.Future[Any]":
    done, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
    return done.pop()


class _Health(health.aio.HealthServicer):  # type: ignore[misc, name-defined]
    """The standard health service, with an end: at shutdown its open watches end too.

    Otherwise each would hold the server for the whole of its grace.
    """

    def __init__(self) -> None:
        super().__init__()
        self._draining = asyncio.Event()

    async def set_all(self, *, serving: bool) -> None:
        """Set the server's status and that of each service."""
        status = health_pb2.HealthCheckResponse
        for name in ("", *SERVICES):
            await self.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def drain(self) -> None:
        """Say NOT_SERVING from now on, and end the watches."""
        await self.enter_graceful_shutdown()
        self._draining.set()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """See grpc.health.v1."""
        watch = asyncio.create_task(super().Watch(request, context))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({watch, draining}, return_when=asyncio.FIRST_COMPLETED)
            # Let the watch tell the last change before it ends.
            if draining.done():
                await asyncio.wait({watch}, timeout=0.1)
        finally:
            for task in (watch, draining):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await watch


def _check_free(host: str, port: int) -> None:
    """Try the address with a plain socket: grpc tells the reason only to its own log."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise InvalidArgument(
            "port", f"cannot listen on {host}, port {port}: {error.strerror}"
        ) from error


@contextmanager
def _signals(stopping: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stopping.is_set():
            # The second one: whoever sends it has waited long enough.
            os._exit(128 + number)
        stopping.set()

    handled = (signal.SIGTERM, signal.SIGINT)
    for number in handled:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


@contextmanager
def _port_file(path: Path | None) -> Iterator[Callable[[int], None]]:
    """Write the port whole or not at all; the file is there only while the server serves."""

    def write(port: int) -> None:
        if path is None:
            return
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(f"{port}\n")
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(path)

    if path is not None:
        if not path.parent.is_dir():
            raise InvalidArgument("port-file", f"{path.parent}: no such directory")
        # One left behind by a killed server would send clients to a port of nobody.
        path.unlink(missing_ok=True)
    try:
        yield write
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
