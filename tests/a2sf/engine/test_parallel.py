"""A model shared by processes gives the same results; models that cannot be shared are refused."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.engine.parallel import Follower, LeadingEngine
from a2sf.errors import InvalidArgument, Unsupported
from a2sf.model import families, tensor_parallel
from a2sf.model.loader import LoadedModel, load_model
from a2sf.model.tensor_parallel import RankLost, Ranks
from a2sf.policy import CachePolicy
from a2sf.requests import FinishReason, GenerationRequest, Sampling
from tests.a2sf.parallel_worker import config_for, serve
from tests.driving import any_requests, finished, prompts, request, run, tokens
from tests.families import save
from tests.tables import make_table
from tests.tiny import save_tiny
from tests.torchrun import command, environment

ROOT = Path(__file__).resolve().parents[3]

LLAMAS: dict[str, dict[str, Any]] = {
    "two KV heads": {"head_dim": 8},
    "several KV heads a rank": {"num_key_value_heads": 4, "num_attention_heads": 8},
    "sizes that do not divide": {"vocab_size": 259, "intermediate_size": 49},
}

JOBS = (*LLAMAS, *families.SUPPORTED_ARCHITECTURES, "odd")


def mixed(model: LoadedModel) -> list[GenerationRequest]:
    """A few requests with different methods, all of which evict."""
    table = make_table(
        model.identity,
        alpha=tuple(
            tuple(0.2 + 0.7 * ((layer + head) % 2) for head in range(model.shape.num_kv_heads))
            for layer in range(model.shape.num_layers)
        ),
        head_share=tuple(
            tuple(1.0 + 0.3 * layer + 0.5 * (head % 3) for head in range(model.shape.num_kv_heads))
            for layer in range(model.shape.num_layers)
        ),
    )
    requested_policies = [
        CachePolicy(table="made-up", budget=16, recent=2, sinks=1),
        CachePolicy(preset="h2o", budget=12, prefill_chunk=5),
        CachePolicy(preset="window", budget=12),
        CachePolicy(preset="random", budget=12, random_seed=5),
    ]
    return [
        request(
            str(index),
            prompt,
            cache_policy=requested_policy,
            table=table if requested_policy.table else None,
            max_new_tokens=12,
            sampling=Sampling(temperature=index % 2 * 0.8, seed=index),
        )
        for index, (prompt, requested_policy) in enumerate(
            zip(prompts(4, low=20, high=40), requested_policies, strict=True)
        )
    ]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The jobs: a model, requests as JSON, and which of them to cancel."""
    made = {}
    for name in JOBS:
        directory = tmp_path_factory.mktemp("model")
        if name == "odd":
            save_tiny(
                LlamaConfig,
                directory,
                hidden_size=24,
                num_attention_heads=3,
                num_key_value_heads=3,
            )
        elif name in LLAMAS:
            save_tiny(LlamaConfig, directory, **LLAMAS[name])
        else:
            save(name, directory)
        model = load_model(str(directory), device="cpu", dtype="float64")
        requests = any_requests(model, 16, seed=3) if name in LLAMAS else mixed(model)
        made[name] = {
            "model": str(directory),
            "requests": [one.model_dump_json() for one in requests],
            "cancel": ["2", "5"] if name in LLAMAS else [],
        }
    return made


@pytest.fixture(scope="module")
def results(
    jobs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The results of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "jobs").write_text(json.dumps(jobs))
    worker = ("-m", "tests.a2sf.parallel_worker", str(folder / "jobs"), str(folder / "results"))
    done = subprocess.run(
        command(*worker),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads((folder / "results").read_text()))


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", [name for name in JOBS if name != "odd"])
def test_two_processes_draw_the_same_tokens_as_one(
    name: str, jobs: dict[str, dict[str, Any]], results: dict[str, Any]
) -> None:
    job, got = jobs[name], results[name]
    model = load_model(job["model"], device="cpu", dtype="float64")
    requests = [GenerationRequest.model_validate_json(text) for text in job["requests"]]
    config = config_for(model)
    alone = Engine(model, config)
    want = serve(alone, requests, job["cancel"])
    assert got["streams"] == want
    caches = [cache for stream in want.values() for cache in stream["cache"]]
    assert sum(cache["evicted_tokens"] > 0 for cache in caches) >= 4
    heads = model.shape.num_kv_heads
    assert got["local_heads"] == [0, heads // 2]
    slots = config.head_slots(model.shape.num_layers, heads)
    mine, whole = (sum(sum(row[:end]) for row in slots) for end in (heads // 2, heads))
    assert mine < whole - mine, "the other rank holds the heads with more slots"
    slot_bytes = 2 * model.shape.head_dim * model.dtype.itemsize + 8
    assert alone.kv_slab_bytes == config.max_batch * whole * slot_bytes
    assert got["slab_bytes"] == [alone.kv_slab_bytes, config.max_batch * mine * slot_bytes]
    whole = sum(parameter.numel() for parameter in model.module.parameters())
    assert got["weights"] < 0.6 * whole, "each process holds about half of the model"


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_number_of_processes_that_does_not_divide_the_heads_is_refused(
    results: dict[str, Any],
) -> None:
    assert results["odd"]["refused"] == (
        "--nproc-per-node: 2 processes cannot divide 3 KV heads evenly; accepted for this model: "
        "1, 3"
    )


class Wire(Ranks):
    """Messages of one process to itself: each sent message is received later."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=1, device=torch.device("cpu"))
        object.__setattr__(self, "messages", [])

    messages: list[bytes]

    def send(self, message: bytes) -> None:
        self.messages.append(message)

    def receive(self) -> bytes:
        if not self.messages:
            raise RankLost("the wire is cut")
        return self.messages.pop(0)


@pytest.fixture
def wire() -> Wire:
    return Wire()


SMALL = EngineConfig(slots=64, max_batch=2, default_policy=CachePolicy(preset="h2o", budget=16))


def ticking(step_s: float) -> Iterator[float]:
    now = 100.0
    while True:
        now += step_s
        yield now


def test_a_follower_applies_time_limits_by_the_first_ranks_clock(
    tiny_model_64: LoadedModel, wire: Wire
) -> None:
    clock = ticking(1.0)
    engine = LeadingEngine(tiny_model_64, SMALL, wire, clock=lambda: next(clock))
    texts = prompts(3, low=20, high=30)
    for name, text in enumerate(texts):
        # Without a seed, the first rank chooses one for all.
        engine.submit(
            request(str(name), text, time_limit_s=20.0 + 9 * name, sampling=Sampling(temperature=1))
        )
    streams = run(engine)
    engine.close()
    reasons = {finished(stream).reason for stream in streams.values()}
    assert FinishReason.TIME_LIMIT in reasons
    assert 0 < min(len(tokens(stream)) for stream in streams.values()) < 20
    # It compares its tokens with those of the first rank in every step.
    Follower(tiny_model_64, wire).run()
    assert not wire.messages


def test_a_follower_that_draws_other_tokens_raises(tiny_model_64: LoadedModel, wire: Wire) -> None:
    engine = LeadingEngine(tiny_model_64, SMALL, wire)
    engine.submit(request("a", prompts(1)[0], sampling=Sampling(temperature=1, seed=7)))
    run(engine)
    engine.close()
    wire.messages[:] = [message.replace(b'"seed":7', b'"seed":8') for message in wire.messages]
    with pytest.raises(RankLost, match="has drawn other tokens than rank 0"):
        Follower(tiny_model_64, wire).run()


def test_ranks_stay_in_step_after_a_refused_or_cancelled_request(
    tiny_model_64: LoadedModel, wire: Wire
) -> None:
    engine = LeadingEngine(tiny_model_64, SMALL, wire)
    texts = prompts(4, low=20, high=30)
    engine.submit(request("a", texts[0]))
    with pytest.raises(InvalidArgument, match="already in use"):
        engine.submit(request("a", texts[1]))
    engine.submit(request("b", texts[1]))
    for _ in range(4):
        engine.step()
    engine.cancel("a")
    engine.submit(request("a", texts[2]))
    streams = run(engine)
    engine.close()
    assert set(streams) == {"a", "b"}
    Follower(tiny_model_64, wire).run()


def test_a_follower_ends_if_the_first_rank_ends_without_closing(
    tiny_model_64: LoadedModel, wire: Wire
) -> None:
    engine = LeadingEngine(tiny_model_64, SMALL, wire)
    engine.submit(request("a", prompts(1)[0]))
    engine.step()
    with pytest.raises(RankLost):
        Follower(tiny_model_64, wire).run()


@pytest.mark.parametrize(
    "plan", [None, {"layers.*.self_attn.o_proj": "colwise", "layers.*.mlp.o_proj": "rowwise"}]
)
def test_a_model_without_a_tensor_parallel_plan_is_refused_by_name(
    plan: dict[str, str] | None,
    tiny_model_dir: Path,
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LlamaConfig, "base_model_tp_plan", plan)
    with pytest.raises(Unsupported, match="is a LlamaForCausalLM, for which transformers has no"):
        load_model(str(tiny_model_dir), ranks=wire)


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert tensor_parallel.num_processes() == 1
    assert tensor_parallel.is_first_rank()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert tensor_parallel.num_processes() == 4
    assert not tensor_parallel.is_first_rank()


@pytest.mark.parametrize("device", ["cuda:0", "cpu:1", "tpu"])
def test_a_device_that_all_ranks_would_share_is_refused(device: str) -> None:
    with pytest.raises(InvalidArgument, match="accepted under torchrun on this machine: auto, "):
        Ranks.join(device)


def test_loading_without_ranks_is_refused_under_torchrun(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("a2sf.model.loader.num_processes", lambda: 2)
    with pytest.raises(Unsupported, match="start it without torchrun"):
        load_model(str(tiny_model_dir))
