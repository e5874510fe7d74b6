"""One rank of a test: serves the requests of a job file, or reports why it refuses.

The first rank writes the results. Run as `torchrun ... -m tests.a2sf.parallel_worker`.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.engine.parallel import Follower, LeadingEngine
from a2sf.errors import A2SFError
from a2sf.model.loader import LoadedModel, load_model
from a2sf.model.tensor_parallel import Ranks
from a2sf.requests import Delta, Event, Finished, GenerationRequest
from tests.driving import run_at_random


def config_for(model: LoadedModel) -> EngineConfig:
    """Shares in which each head has more slots than the one before, so ranks hold unequal heads."""
    heads, layers = model.identity.num_kv_heads, model.identity.num_layers
    shares = tuple(tuple(heads + layer + head for head in range(heads)) for layer in range(layers))
    return EngineConfig(
        slots=400, max_batch=3, head_share=tuple(tuple(map(float, row)) for row in shares)
    )


def outcome(stream: list[Event]) -> dict[str, Any]:
    """The parts of a stream that must not depend on the number of processes."""
    deltas = [event for event in stream if isinstance(event, Delta)]
    ends = [event for event in stream if isinstance(event, Finished)]
    return {
        "tokens": [token for delta in deltas for token in delta.token_ids],
        "text": "".join(delta.text for delta in deltas),
        "reason": [end.reason.value for end in ends],
        "cache": [end.cache.model_dump() for end in ends],
    }


def serve(engine: Engine, requests: list[GenerationRequest], cancel: list[str]) -> dict[str, Any]:
    """Submit and cancel at random, in the same way for every engine."""
    streams = run_at_random(engine, requests, random.Random(1), cancel=cancel)
    return {name: outcome(stream) for name, stream in streams.items()}


def work(job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Do one job on this rank; only the first rank's result is used."""
    try:
        model = load_model(job["model"], dtype="float64", ranks=ranks)
    except A2SFError as error:
        return {"refused": str(error)}
    if ranks.rank:
        Follower(model, ranks).run()
        return {}
    engine = LeadingEngine(model, config_for(model), ranks)
    requests = [GenerationRequest.model_validate_json(text) for text in job["requests"]]
    done = serve(engine, requests, job["cancel"])
    engine.close()
    return {
        "streams": done,
        "local_heads": model.local_heads,
        "slab_bytes": [engine.kv_slab_bytes, Engine.kv_slab_bytes.fget(engine)],  # type: ignore[attr-defined]
        "weights": sum(getattr(p, "_local_tensor", p).numel() for p in model.module.parameters()),
    }


def main(source: str, target: str) -> None:
    """Do the jobs of the file `source`, one after the other; write the results to `target`."""
    torch.set_num_threads(1)
    ranks = Ranks.join("cpu")
    jobs = json.loads(Path(source).read_text())
    results = {name: work(job, ranks) for name, job in jobs.items()}
    if ranks.rank == 0:
        Path(target).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
