"""A replica without Ray: its methods, health, tokens and settings."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from a2sf.engine.engine import Engine
from a2sf.errors import InvalidArgument
from service.backend.runner import EngineCrashed
from service.config.settings import NAMES, flag
from service.pb import inference_pb2 as pb
from service.ray_serve.options import REFUSED, RayOptions
from service.ray_serve.replica import SERVICES, Replica
from service.status import DETAILS_KEY
from tests.service.conftest import WAIT_S, until

GenerationInput = pb.GenerationInput
LONG = GenerationInput(text="x", max_new_tokens=900_000, ignore_eos=True)
SHORT = GenerationInput(text="x", max_new_tokens=2, ignore_eos=True)


class Context:
    """Ray's context of a call."""

    def __init__(self, **metadata: str) -> None:
        self.metadata = list(metadata.items())
        self.code = grpc.StatusCode.OK
        self.details = ""
        self.trailers: dict[str, Any] = {}

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self.metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None:
        self.trailers = dict(trailing_metadata)


@asynccontextmanager
async def made(model: Path, **options: Any) -> AsyncIterator[Replica]:
    replica = Replica.__new__(Replica)
    sizes = {"slots": 64, "default_budget": 32, "max_batch": 2, "max_waiting": 1}
    await replica.__init__(  # type: ignore[misc]
        RayOptions(model=str(model), device="cpu", **sizes, **options)
    )
    try:
        yield replica
    finally:
        await replica._backend.runner.stop(10.0)


async def health(replica: Replica) -> Any:
    return (await replica.Check(health_pb2.HealthCheckRequest(), Context())).status


def test_every_rpc_of_its_services_has_a_method_as_ray_calls_it() -> None:
    for name in SERVICES:
        for method in pb.DESCRIPTOR.services_by_name[name.rpartition(".")[2]].methods:
            handler = getattr(Replica, method.name)
            assert list(inspect.signature(handler).parameters) == [
                "self",
                "request",
                "grpc_context",
            ]
            assert inspect.isasyncgenfunction(handler) == method.server_streaming


async def test_a_crashed_engine_fails_the_health_check_refuses_calls_and_ends_the_process(
    long_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: list[int] = []
    monkeypatch.setattr("os._exit", exits.append)
    async with made(long_model_dir) as replica:
        await replica.check_health()
        assert await health(replica) == health_pb2.HealthCheckResponse.SERVING

        def fail(_: Engine) -> None:
            raise RuntimeError("a secret of the house")

        monkeypatch.setattr(Engine, "step", fail)
        context = Context()
        await replica.Generate(pb.GenerateRequest(input=SHORT), context)
        assert context.code is grpc.StatusCode.INTERNAL
        assert "secret" not in context.details
        with pytest.raises(EngineCrashed):
            await replica.check_health()
        assert await health(replica) == health_pb2.HealthCheckResponse.NOT_SERVING
        # A turn of the loop later.
        async with asyncio.timeout(WAIT_S):
            while context.code is grpc.StatusCode.INTERNAL:
                await replica.Generate(pb.GenerateRequest(input=SHORT), context)
        assert context.code is grpc.StatusCode.UNAVAILABLE
        assert DETAILS_KEY in context.trailers
        await until(lambda: exits == [1])


@pytest.mark.parametrize("leave", ["close", "cancel"])
async def test_leaving_a_stream_frees_its_row(long_model_dir: Path, leave: str) -> None:
    async with made(long_model_dir) as replica:
        runner = replica._backend.runner

        async def read() -> None:
            events = replica.StreamGenerate(pb.StreamGenerateRequest(input=LONG), Context())
            async with aclosing(events):
                async for _ in events:
                    if leave == "close":
                        return

        reading = asyncio.create_task(read())
        if leave == "cancel":
            await until(lambda: runner.load.running == 1)
            reading.cancel()
        await asyncio.wait({reading})
        await until(lambda: runner.load.running == 0)
        assert replica._backend.gate.num_calls == 0


async def test_a_refused_stream_ends_with_its_status_and_an_empty_message(
    long_model_dir: Path,
) -> None:
    async with made(long_model_dir) as replica:
        context = Context()
        request = pb.StreamGenerateRequest(input=GenerationInput(text="x"))
        said = [message async for message in replica.StreamGenerate(request, context)]
        assert said == [pb.StreamGenerateResponse()]
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
        assert DETAILS_KEY in context.trailers


async def test_calls_need_a_token_if_there_is_a_token_file_and_health_needs_none(
    long_model_dir: Path, tmp_path: Path
) -> None:
    token = "inference-token-0123456789"
    file = tmp_path / "tokens"
    file.write_text(f"{token}\n")
    file.chmod(0o600)
    async with made(long_model_dir, token_file=file) as replica:

        async def code(call: Callable[[Context], Awaitable[Any]], **metadata: str) -> Any:
            context = Context(**metadata)
            await call(context)
            return context.code

        async def stream(context: Context) -> None:
            request = pb.StreamGenerateRequest(input=SHORT)
            async for _ in replica.StreamGenerate(request, context):
                pass

        async def model(context: Context) -> None:
            await replica.GetModel(pb.GetModelRequest(), context)

        for call in (stream, model):
            assert await code(call) is grpc.StatusCode.UNAUTHENTICATED
            good = {"authorization": f"Bearer {token}"}
            assert await code(call, **good) is grpc.StatusCode.OK
        assert await health(replica) == health_pb2.HealthCheckResponse.SERVING


def test_an_application_sets_the_capacity_of_a_replica() -> None:
    application = pytest.importorskip("service.ray_serve.application")
    options = RayOptions.model_validate(
        {"max_batch": "3", "max_waiting": "4", "num_gpus": "0.5", "insecure_bind": "true"}
    )
    deployment = application.app(options)._bound_deployment
    assert deployment.max_ongoing_requests == 3 + 4
    assert deployment.ray_actor_options["num_gpus"] == 0.5


@pytest.mark.parametrize("field", REFUSED)
def test_a_setting_without_meaning_under_ray_is_refused_by_name(field: str) -> None:
    value = RayOptions.model_construct().model_dump()[field]
    options = RayOptions.model_construct(**{field: value, "insecure_bind": True})
    with pytest.raises(InvalidArgument, match="not accepted under Ray Serve") as caught:
        options.check()
    assert caught.value.field == flag(NAMES[field])


def test_insecure_bind_is_required_under_ray() -> None:
    with pytest.raises(InvalidArgument, match="every address") as caught:
        RayOptions().check()
    assert caught.value.field == "--insecure-bind"
    RayOptions(insecure_bind=True).check()
