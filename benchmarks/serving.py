"""Times the cost of the service: tokens through gRPC compared with the engine's own.

Owns three measurements on one model: tokens per second of many streams, the time to the first token
of one, and the time of a health check while the streams run. The engine alone and the server
(`python -m service`) run in separate processes. They alternate, so that neither disturbs the other
and both use the same machine. The client is this process, on the same machine. With as many threads
of the engine as there are cores, all three share the cores. With one thread less, the service and
the client have one core for themselves, as beside a GPU.

    python -m benchmarks.serving [--model random|reference] [--streams 16] [--rounds 5] [--out FILE]
"""

import asyncio
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import grpc
import numpy
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.model.loader import load_model
from a2sf.policy import CachePolicy
from a2sf.requests import Delta, GenerationRequest, Sampling
from a2sf.threads import set_threads
from benchmarks import RESULTS, save
from benchmarks.peers.models import prepare, prompt
from service.client import Client

SLOTS = 512
PROMPT_TOKENS = 64
POLICY = CachePolicy(alpha=0.9, budget=256, recent=64)
GREEDY = Sampling(temperature=0.0)
HEALTH_EVERY_S = 0.01
CORES = os.cpu_count() or 1
TIMEOUT_S = 600.0
START_S = 120.0

Arrivals: TypeAlias = list[list[float]]
"""For each stream, the times of its tokens, in seconds after the common start."""

app = typer.Typer(add_completion=False)


def rate(arrivals: Arrivals) -> float:
    """Tokens per second while all streams ran: from the last first token to the first last one."""
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    return sum(begin < at <= end for times in arrivals for at in times) / (end - begin)


class Alone:
    """The engine in a separate process, which runs commands and returns times."""

    def __init__(
        self, directory: Path, streams: int, threads: int, environment: dict[str, str]
    ) -> None:
        command = ["engine", str(directory), "--streams", str(streams), "--threads", str(threads)]
        self._process = _started(command, environment)
        assert self._read() == "ready"

    def run(self, streams: int, tokens: int) -> Arrivals:
        """Make this many completions together, with this many tokens each."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([streams, tokens]) + "\n")
        self._process.stdin.flush()
        arrivals: Arrivals = self._read()
        return arrivals

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT_S)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def served(*options: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Run `python -m service` on the CPU in float32 during the block; yield its address.

    Raises RuntimeError with the server's output if it does not serve within START_S seconds.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        port_file = Path(folder) / "port"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "service", *options, "--device", "cpu"),
                *("--dtype", "float32", "--port", "0", "--port-file", str(port_file)),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + START_S
            while not port_file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start:\n{log.read()}")
                time.sleep(0.1)
            yield f"127.0.0.1:{int(port_file.read_text())}"
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)


async def through(client: Client, ids: Sequence[int], streams: int, tokens: int) -> Arrivals:
    """Make this many completions together through gRPC, with this many tokens each."""
    started = time.perf_counter()

    async def one() -> list[float]:
        events = client.stream_generate(
            ids,
            max_new_tokens=tokens,
            sampling=GREEDY,
            ignore_eos=True,
            cache_policy=POLICY,
            timeout_s=TIMEOUT_S,
        )
        async with aclosing(events):
            return [time.perf_counter() - started async for e in events if isinstance(e, Delta)]

    return list(await asyncio.gather(*(one() for _ in range(streams))))


@app.command()
def compare(
    model: Annotated[list[str] | None, typer.Option(help="random (100M) or reference.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads of the engine.")] = None,
    streams: Annotated[int, typer.Option(help="Completions at once.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of each completion.")] = 96,
    rounds: Annotated[int, typer.Option(help="Turns of each side.")] = 7,
    firsts: Annotated[int, typer.Option(help="First tokens timed on each side.")] = 20,
    out: Annotated[Path, typer.Option(help="File of the JSON.")] = RESULTS / "serving-cpu.json",
) -> None:
    """Time both sides in turns and write the figures with machine and versions."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    rows = []
    for name in model or ["random", "reference"]:
        directory = prepare(name, Path("build/peers/models"))
        for count in threads or sorted({CORES, max(CORES - 1, 1)}, reverse=True):
            alone = Alone(directory, streams, count, environment)
            options = (
                *("--model", str(directory), "--slots", str(SLOTS)),
                *("--max-batch", str(streams), "--threads", str(count)),
            )
            with served(*options, environment=environment) as address:
                measured = _measure(alone, address, directory, streams, tokens, rounds, firsts)
                rows.append({"model": name, "threads": count, **asyncio.run(measured)})
            alone.close()
            typer.echo(json.dumps(rows[-1]))
    loaded = load_model(str(directory), device="cpu", dtype="float32")
    save(out, loaded, streams=streams, tokens=tokens, rounds=rounds, rows=rows)


async def _measure(
    alone: Alone,
    address: str,
    directory: Path,
    streams: int,
    tokens: int,
    rounds: int,
    firsts: int,
) -> dict[str, Any]:
    ids = _prompt(directory)
    async with Client(address) as client:
        # One untimed warm-up.
        alone.run(streams, 8)
        await through(client, ids, streams, 8)

        first: dict[str, list[float]] = {"engine": [], "grpc": []}
        steps = []
        for _ in range(firsts):
            (times,) = alone.run(1, 4)
            first["engine"].append(times[0])
            steps += numpy.diff(times).tolist()
            first["grpc"].append((await through(client, ids, 1, 4))[0][0])

        rates: dict[str, list[float]] = {"engine": [], "grpc": []}
        for turn in range(rounds):
            # Alternate the order, so that neither side always comes first.
            for side in ("engine", "grpc") if turn % 2 else ("grpc", "engine"):
                ran = (
                    alone.run(streams, tokens)
                    if side == "engine"
                    else await through(client, ids, streams, tokens)
                )
                rates[side].append(rate(ran))

        probe = _started(["health", address], dict(os.environ))
        assert probe.stdout is not None
        await asyncio.to_thread(probe.stdout.readline)
        for _ in range(max(rounds // 2, 1)):
            await through(client, ids, streams, tokens)
        answers, _ = await asyncio.to_thread(probe.communicate, "\n")
    health = 1e3 * numpy.array(json.loads(answers))
    share = numpy.array(rates["grpc"]) / numpy.array(rates["engine"])
    return {
        "engine_tokens_per_s": round(float(numpy.median(rates["engine"])), 1),
        "grpc_tokens_per_s": round(float(numpy.median(rates["grpc"])), 1),
        "share_median": round(float(numpy.median(share)), 3),
        "share_quartiles": [round(q, 3) for q in numpy.percentile(share, [25, 75]).tolist()],
        "first_token_engine_ms": round(1e3 * float(numpy.median(first["engine"])), 2),
        "first_token_grpc_ms": round(1e3 * float(numpy.median(first["grpc"])), 2),
        "decode_step_ms": round(1e3 * float(numpy.median(steps)), 2),
        "health_checks": len(health),
        "health_ms_p50": round(float(numpy.percentile(health, 50)), 2),
        "health_ms_p99": round(float(numpy.percentile(health, 99)), 2),
        "health_ms_max": round(float(health.max()), 2),
    }


@app.command(hidden=True)
def engine(directory: str, streams: int = 16, threads: int = CORES) -> None:
    """Run completions for the comparison: read lines [streams, tokens], write arrivals."""
    set_threads(threads)
    model = load_model(directory, device="cpu", dtype="float32")
    runs = Engine(model, EngineConfig(slots=SLOTS, max_batch=streams, default_policy=POLICY))
    ids = tuple(_prompt(Path(directory)))
    _say("ready")
    for line in sys.stdin:
        count, tokens = json.loads(line)
        started = time.perf_counter()
        arrivals: dict[str, list[float]] = {str(number): [] for number in range(count)}
        for name in arrivals:
            runs.submit(
                GenerationRequest(
                    request_id=name,
                    prompt_ids=ids,
                    max_new_tokens=tokens,
                    sampling=GREEDY,
                    ignore_eos=True,
                    cache_policy=POLICY,
                )
            )
        while runs.has_work:
            events = runs.step()
            now = time.perf_counter() - started
            for event in events:
                if isinstance(event, Delta):
                    arrivals[event.request_id].append(now)
        _say(list(arrivals.values()))


@app.command(hidden=True)
def health(address: str) -> None:
    """Check a server's health repeatedly until a line arrives on stdin; print the times."""
    taken = []
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        _say("ready")
        while not select.select([sys.stdin], [], [], HEALTH_EVERY_S)[0]:
            started = time.perf_counter()
            check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            taken.append(time.perf_counter() - started)
    _say(taken)


def _prompt(directory: Path) -> list[int]:
    vocabulary: int = json.loads((directory / "config.json").read_text())["vocab_size"]
    return prompt(vocabulary, PROMPT_TOKENS)


def _started(arguments: Sequence[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _say(value: Any) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    # The default command is compare; engine and health are its child processes.
    known = {"engine", "health"} & set(sys.argv[1:2])
    app(sys.argv[1:] if known else ["compare", *sys.argv[1:]])
