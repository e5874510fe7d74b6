"""The server: one engine with its ports.

Owns the order in which parts start and end. The ports are bound first, so that a port in use is
reported before a model is loaded. Until the engine is warm, health is NOT_SERVING and calls are
UNAVAILABLE. Knows nothing of what requests mean, or of processes and signals.
"""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial

import structlog

from service.backend.loading import Core, load_core
from service.config.options import ServerOptions, is_loopback
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.rpc.admin import AdminServicer
from service.rpc.auth import BearerAuth, TokenFile
from service.rpc.inference import InferenceServicer, ModelServicer
from service.rpc.listener import Listener
from service.rpc.malformed import DecodingInterceptor
from service.rpc.startup import end_calls, make_backend, warm
from service.rpc.tls import server_credentials
from service.telemetry.metrics import MetricsServer, serve_metrics

log = structlog.get_logger(__name__)

_SERVICES = pb.DESCRIPTOR.services_by_name
SERVICES = tuple(service.full_name for service in _SERVICES.values())
ADMIN_SERVICES = (_SERVICES["AdminService"].full_name,)
INFERENCE_SERVICES = tuple(name for name in SERVICES if name not in ADMIN_SERVICES)

FLUSH_S = 2.0
"""Seconds for final statuses to reach their clients before connections are closed."""


class Server:
    """One engine and its ports. Create and use it in one event loop."""

    def __init__(self, options: ServerOptions, load: Callable[[ServerOptions], Core] = load_core):
        """Read tokens and certificates. Raises InvalidArgument with the flag and the file."""
        self._options = options
        self._load = load
        self._backend = backend = make_backend(options)
        self._gate, self._runner = backend.gate, backend.runner
        self._metrics, self._tracer = backend.metrics, backend.tracer
        self._metrics_server: MetricsServer | None = None
        self._watching: asyncio.Task[None] | None = None
        self._admin: Listener | None = None
        self._admin_port: int | None = None
        self.thread_left_running = False

        def listener(services: tuple[str, ...], tokens: TokenFile | None) -> Listener:
            return Listener(
                services,
                # New credentials for each port: grpc accepts such credentials for one port only.
                credentials=server_credentials(options),
                interceptors=[
                    *([BearerAuth(tokens, self._metrics)] if tokens is not None else []),
                    DecodingInterceptor(self._metrics),
                ],
                max_message_bytes=options.max_message_bytes,
            )

        self._listener = listener(
            INFERENCE_SERVICES,
            TokenFile(options.token_file, "--token-file") if options.token_file else None,
        )
        pb_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(self._backend), self._listener.server
        )
        pb_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(self._backend), self._listener.server
        )
        if options.admin_port is not None:
            assert options.admin_token_file is not None, "the options' own check"
            self._admin = listener(
                ADMIN_SERVICES, TokenFile(options.admin_token_file, "--admin-token-file")
            )
            pb_grpc.add_AdminServiceServicer_to_server(
                AdminServicer(self._backend), self._admin.server
            )

    @property
    def core(self) -> Core:
        """The loaded core."""
        return self._backend.core

    @property
    def num_calls(self) -> int:
        """Number of calls under way."""
        return self._gate.num_calls

    @property
    def ended_completions(self) -> tuple[int, int]:
        """Number of completions since the start that finished, and that ended otherwise."""
        return self._gate.finished, self._gate.unfinished

    @property
    def crashed(self) -> "asyncio.Future[BaseException]":
        """Done once the engine has died; then only `stop` may be called."""
        return self._runner.crashed

    @property
    def admin_address(self) -> str | None:
        """Address of the admin service, once bound; None without one."""
        if self._admin_port is None:
            return None
        return self._options.model_copy(update={"admin_port": self._admin_port}).admin_address

    @property
    def metrics_url(self) -> str | None:
        """URL of the metrics, once bound; None without metrics."""
        if self._metrics_server is None:
            return None
        port = self._metrics_server.port
        address = self._options.model_copy(update={"metrics_port": port}).metrics_address
        return f"http://{address}/metrics"

    async def bind(self) -> int:
        """Listen, not serving yet; return the port. Raises InvalidArgument if that fails."""
        options = self._options
        # Check all addresses before binding any of them.
        address = options.address
        admin = options.admin_address if options.admin_port is not None else None
        metrics = options.metrics_address if options.metrics_port is not None else None
        if options.tls_cert is None:
            for flag, file, host in (
                ("--token-file", options.token_file, options.host),
                ("--admin-token-file", options.admin_token_file, options.admin_host),
            ):
                if file is not None and not is_loopback(host):
                    log.warning("tokens cross the network in plain text", flag=flag, host=host)
        if options.log_prompts:
            log.warning("prompts and completions are logged", flag="--log-prompts")
        port = await self._listener.bind(address, "--port")
        if self._admin is not None and admin is not None:
            self._admin_port = await self._admin.bind(admin, "--admin-port")
        if metrics is not None and options.metrics_port is not None:
            self._metrics_server = serve_metrics(
                self._metrics, options.metrics_host, options.metrics_port
            )
        return port

    async def warm(self) -> None:
        """Load, generate one tiny completion, and serve. Raises the errors of loading."""
        self._watching = await warm(self._backend, partial(self._load, self._options))
        for listener in self._listeners():
            await listener.health.set_all(serving=True)

    async def drain(self, grace_s: float, settle_s: float = 0.0) -> None:
        """Report NOT_SERVING, refuse new calls after `settle_s` seconds, then wait up to `grace_s`
        seconds for running calls to finish.
        """
        for listener in self._listeners():
            await listener.health.drain()
        # During this wait, load balancers notice NOT_SERVING. It is useless if the engine is dead
        # or the server has never served.
        if self._gate.capacity:
            await asyncio.wait({self.crashed}, timeout=settle_s)
        self._gate.close("the server is shutting down")
        try:
            await asyncio.wait_for(self._gate.wait_until_empty(), grace_s)
        except TimeoutError:
            log.warning("calls did not finish in time", calls=self._gate.num_calls, grace_s=grace_s)

    async def stop(self) -> None:
        """End every call with a status, then the ports and the engine's thread.

        Afterwards, `thread_left_running` is True if that thread did not end.
        """
        await end_calls(self._backend, self._watching)
        await asyncio.gather(*(listener.stop(FLUSH_S) for listener in self._listeners()))
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        await asyncio.to_thread(self._tracer.shutdown, FLUSH_S)
        self.thread_left_running = not await self._runner.stop(FLUSH_S)

    def _listeners(self) -> Iterator[Listener]:
        yield self._listener
        if self._admin is not None:
            yield self._admin
