"""Compares tokens through the service with the engine's own, on the small model, in turns.

The service runs as for users, in a separate process, and the real client calls it. Needs gRPC,
which only this module imports. Knows nothing of the other parts.
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.model.loader import LoadedModel
from a2sf.requests import Delta, GenerationRequest
from benchmarks.gpu.prefill import prompt_ids
from benchmarks.gpu.report import Deadline, NotSupported
from benchmarks.gpu.run import Run
from benchmarks.gpu.timing import spread

PROMPT_TOKENS = 64
WARM_UP_TOKENS = 8

NEEDED = ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "structlog", "prometheus_client")


def measure(run: Run) -> None:
    """Save the model, start the service on it, and alternate between both sides."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise NotSupported(f"not installed here: {', '.join(missing)}")
    from benchmarks import serving
    from service.client import Client

    model = run.model("1b")
    sizes = run.sizes
    ids = prompt_ids(model, PROMPT_TOKENS)
    alone = Engine(
        model,
        EngineConfig(slots=serving.SLOTS, max_batch=sizes.streams, default_policy=serving.POLICY),
    )

    async def compare(address: str) -> dict[str, list[float]]:
        rates: dict[str, list[float]] = {"engine": [], "grpc": []}
        async with Client(address) as client:
            _alone(alone, ids, sizes.streams, WARM_UP_TOKENS)
            await serving.through(client, ids, sizes.streams, WARM_UP_TOKENS)
            for number in range(sizes.rounds):
                for side in ("engine", "grpc") if number % 2 else ("grpc", "engine"):
                    run.deadline.check()
                    if side == "engine":
                        ran = _alone(alone, ids, sizes.streams, sizes.stream_tokens)
                    else:
                        ran = await serving.through(client, ids, sizes.streams, sizes.stream_tokens)
                    rates[side].append(serving.rate(ran))
        return rates

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save(model, directory)
        with served(run, directory, serving.SLOTS) as address:
            rates = asyncio.run(compare(address))
    shares = [through / own for through, own in zip(rates["grpc"], rates["engine"], strict=True)]
    run.report.add(
        f"{sizes.streams} streams through gRPC against the engine alone",
        streams=sizes.streams,
        tokens_of_each=sizes.stream_tokens,
        share_of_engine=spread(shares, 3),
        grpc_tokens_per_s=spread(rates["grpc"], 1),
        engine_tokens_per_s=spread(rates["engine"], 1),
    )


def save(model: LoadedModel, directory: Path) -> None:
    """Write a checkpoint that the service loads."""
    model.module.save_pretrained(directory, safe_serialization=True)
    model.tokenizer.save_pretrained(directory)


@contextmanager
def served(run: Run, directory: Path, slots: int) -> Iterator[str]:
    """Run the service on this device during the block; yield its address."""
    port_file = directory.with_name("port")
    with directory.with_name("log").open("w+") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "service", "--model", str(directory)),
                *("--device", run.device.type, "--slots", str(slots)),
                *("--dtype", "float32" if run.device.type == "cpu" else "bfloat16"),
                *("--max-batch", str(run.sizes.streams)),
                *("--port", "0", "--port-file", str(port_file)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            _await(port_file, process, run.deadline)
            yield f"127.0.0.1:{int(port_file.read_text())}"
        except RuntimeError as error:
            log.seek(0)
            last = log.read().strip().splitlines()[-1:]
            raise RuntimeError(f"{error}; {' '.join(last)[:300]}") from error
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(port_file: Path, process: "subprocess.Popen[bytes]", deadline: Deadline) -> None:
    while not port_file.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the service has ended with {process.returncode}")
        deadline.check()
        time.sleep(0.1)


def _alone(engine: Engine, ids: list[int], streams: int, tokens: int) -> list[list[float]]:
    """Make completions together without the service; return the times of each one's tokens."""
    from benchmarks import serving

    began = time.perf_counter()
    arrivals: dict[str, list[float]] = {str(number): [] for number in range(streams)}
    for name in arrivals:
        request: dict[str, Any] = {"prompt_ids": tuple(ids), "max_new_tokens": tokens}
        engine.submit(
            GenerationRequest(
                request_id=name,
                sampling=serving.GREEDY,
                ignore_eos=True,
                cache_policy=serving.POLICY,
                **request,
            )
        )
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter() - began
        for event in events:
            if isinstance(event, Delta):
                arrivals[event.request_id].append(now)
    return list(arrivals.values())
