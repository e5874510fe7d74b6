"""A real server with what the manifests give a pod: settings, probes, volumes that change."""

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing
from itertools import count
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from a2sf.errors import Unauthenticated
from a2sf.tablefile import load_table, save_table
from service.client import ChannelOptions, Client, Tls
from tests.docker.kubernetes import Rendered, Resource, overlay_of
from tests.service.conftest import WAIT_S, ServerProcess
from tests.tables import make_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

TOKEN, NEXT_TOKEN = "first-token-0123456789", "second-token-0123456789"

SHIPPED = Path(__file__).resolve().parents[2] / "a2sf" / "reference" / "tables" / "mathqa.json"

SETTLE_S = 8.0
"""Long enough for a probe, which is a process that starts, on a busy machine."""


class Volume:
    """A ConfigMap or Secret as it is mounted: each file links through `..data` to a version."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._versions = count()
        directory.mkdir(parents=True)

    def put(self, files: Mapping[str, bytes]) -> None:
        """Change it as the kubelet does: the new version beside the old, then one rename."""
        version = self.directory / f"..2026_01_31_09_30_00.{next(self._versions)}"
        version.mkdir()
        for name, content in files.items():
            (version / name).write_bytes(content)
        link, fresh = self.directory / "..data", self.directory / "..data_tmp"
        past = link.resolve() if link.is_symlink() else None
        fresh.symlink_to(version.name)
        fresh.rename(link)
        shown = {path.name for path in self.directory.iterdir() if not path.name.startswith("..")}
        for name in files.keys() - shown:
            (self.directory / name).symlink_to(f"..data/{name}")
        for name in shown - files.keys():
            (self.directory / name).unlink()
        if past is not None:
            shutil.rmtree(past)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.2)


def certificate(authority: trustme.CA) -> dict[str, bytes]:
    leaf = authority.issue_cert("a2sf")
    return {
        "tls.crt": b"".join(pem.bytes() for pem in leaf.cert_chain_pems),
        "tls.key": leaf.private_key_pem.bytes(),
        "ca.crt": authority.cert_pem.bytes(),
    }


class Pod:
    """The service's container of an overlay, as a process on this machine."""

    def __init__(
        self, overlay: Rendered, directory: Path, setenv: Callable[[str, str], None]
    ) -> None:
        self.container = overlay.container
        self.grace_s = float(overlay.pod["terminationGracePeriodSeconds"])
        self._root = directory
        self._arguments = overlay.arguments
        # The packaged model, without a GPU and on the loopback alone.
        here = {
            "A2SF_MODEL": "reference",
            "A2SF_DEVICE": "cpu",
            "A2SF_HOST": "127.0.0.1",
            "A2SF_PORT": "0",
            "A2SF_METRICS_HOST": "127.0.0.1",
            "A2SF_METRICS_PORT": "0",
            "A2SF_SETTLE": f"{SETTLE_S:g}",
        }
        for name, value in (overlay.settings | here).items():
            setenv(name, self._placed(value))

    def volume(self, place: str) -> Volume:
        return Volume(Path(self._placed(place)))

    def _placed(self, word: str) -> str:
        for place in ("/etc/a2sf", "/tables"):
            word = word.replace(place, f"{self._root}{place}")
        return word

    @asynccontextmanager
    async def run(self) -> AsyncIterator[ServerProcess]:
        process = ServerProcess(self._root, (), ("-m", "service", *self._arguments))
        try:
            yield process
        finally:
            process.close()

    async def probe(self, kind: str, address: str) -> int:
        """Run a probe's command; return its exit code."""
        program, *words = self.container[f"{kind}Probe"]["exec"]["command"]
        assert program == "python"
        words = [self._placed(w).replace("127.0.0.1:50051", address) for w in words]
        return await asyncio.to_thread(
            lambda: subprocess.run([sys.executable, *words], capture_output=True).returncode
        )


@pytest.fixture
def pod(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pod:
    return Pod(overlay_of(request.param), tmp_path, monkeypatch.setenv)


@pytest.mark.parametrize("pod", ["production"], indirect=True)
async def test_production_takes_tables_tokens_and_certificates_as_their_volumes_change(
    pod: Pod, tmp_path: Path
) -> None:
    tables = pod.volume("/tables")
    tokens = pod.volume("/etc/a2sf/tokens")
    secrets = pod.volume("/etc/a2sf/tls")
    tokens.put({"tokens": f"{TOKEN}\n".encode()})
    secrets.put(certificate(trustme.CA()))
    tls = Tls(root_ca=secrets.directory / "ca.crt", server_name="a2sf")
    async with pod.run() as process:
        address = await process.address()
        for kind in ("startup", "readiness", "liveness"):
            assert await pod.probe(kind, address) == 0, process.log

        # The ConfigMap need not be there at the start.
        shipped = load_table(SHIPPED)
        again = make_table(shipped.model, name="mathqa", budget=24)
        async with Client(address, ChannelOptions(token=TOKEN, tls=tls)) as client:

            async def served() -> dict[str, str]:
                listing = await client.list_alpha_tables()
                return {name: table.sha256 for name, table in listing.tables.items()}

            assert await served() == {}
            for table in (shipped, again):
                save_table(table, tmp_path / "mathqa.json")
                tables.put({"mathqa.json": (tmp_path / "mathqa.json").read_bytes()})

                async def is_served(sha256: str = table.sha256) -> bool:
                    return await served() == {"mathqa": sha256}

                await eventually(is_served)
        assert "alpha table refused" not in process.log

        tokens.put({"tokens": f"{NEXT_TOKEN}\n".encode()})

        async def is_refused() -> bool:
            async with Client(address, ChannelOptions(token=TOKEN, tls=tls)) as client:
                try:
                    await client.get_model()
                except Unauthenticated:
                    return True
            return False

        await eventually(is_refused)
        async with Client(address, ChannelOptions(token=NEXT_TOKEN, tls=tls)) as client:
            await client.get_model()

        secrets.put(certificate(trustme.CA()))

        async def trusted() -> bool:
            return await pod.probe("readiness", address) == 0

        await eventually(trusted)


@pytest.mark.parametrize("pod", ["production"], indirect=True)
async def test_production_is_not_ready_while_it_settles_and_ends_within_its_time(pod: Pod) -> None:
    pod.volume("/tables")
    pod.volume("/etc/a2sf/tokens").put({"tokens": f"{TOKEN}\n".encode()})
    secrets = pod.volume("/etc/a2sf/tls")
    secrets.put(certificate(trustme.CA()))
    tls = Tls(root_ca=secrets.directory / "ca.crt", server_name="a2sf")
    async with pod.run() as process:
        address = await process.address()
        async with Client(address, ChannelOptions(token=TOKEN, tls=tls)) as client:
            began = time.monotonic()
            process.process.send_signal(signal.SIGTERM)
            await process.logged("stopping")
            assert await pod.probe("readiness", address) == 1
            # Endpoints take time to go: calls that still arrive are served.
            answer = await client.generate("Once", max_new_tokens=2, ignore_eos=True)
            assert answer.finished.usage.completion_tokens == 2
        assert await process.ended() == 0, process.log
        assert SETTLE_S <= time.monotonic() - began < pod.grace_s


async def health_of(address: str, probe: Resource) -> str:
    """The answer to a gRPC probe, or the code of its failure."""
    request = health_pb2.HealthCheckRequest(service=probe["grpc"].get("service", ""))
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=2.0)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


@pytest.mark.parametrize("pod", ["try"], indirect=True)
async def test_the_liveness_probe_sees_a_server_that_hangs_and_a_connection_does_not(
    pod: Pod,
) -> None:
    pod.volume("/tables")
    async with pod.run() as process:
        address = await process.address()
        probes = [pod.container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
        assert [await health_of(address, probe) for probe in probes] == ["SERVING"] * 3
        process.process.send_signal(signal.SIGSTOP)
        try:
            host, port = address.split(":")
            with closing(socket.create_connection((host, int(port)), WAIT_S)):
                assert await health_of(address, probes[2]) == "DEADLINE_EXCEEDED"
        finally:
            process.process.send_signal(signal.SIGCONT)
        assert await health_of(address, probes[2]) == "SERVING"
