"""Alpha tables for tests, whole and sealed, with made-up provenance."""

import random
from datetime import UTC, datetime
from typing import Any

from a2sf.schema import (
    AlphaTable,
    Calibration,
    Estimate,
    Evidence,
    ModelIdentity,
    Search,
    TablePolicy,
    UniformSetting,
    seal,
)

IDENTITY = ModelIdentity(
    id="m",
    revision=None,
    architecture="LlamaForCausalLM",
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    fingerprint="a" * 64,
)
"""A small model that does not exist."""


def random_alpha(identity: ModelIdentity, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    """Factors from 0 to 1, both ends among them."""
    rng = random.Random(seed)
    choices = [0.0, 0.3, 0.5, 0.9, 0.99, 1.0]
    return tuple(
        tuple(rng.choice(choices) for _ in range(identity.num_kv_heads))
        for _ in range(identity.num_layers)
    )


def table_fields(
    identity: ModelIdentity, *, name: str = "made-up", **policy: Any
) -> dict[str, Any]:
    """All fields but version and digest, with `policy` over the defaults of its kind."""
    settings: dict[str, Any] = {
        "alpha": random_alpha(identity),
        "layer_share": (1.0,) * identity.num_layers,
        "budget": 24,
        "recent": 4,
        "sinks": 2,
        "prefill_chunk": 0,
        **policy,
    }
    figure = Estimate(mean=0.1, low=0.05, high=0.2)
    return {
        "name": name,
        "model": identity,
        "policy": TablePolicy(**settings),
        "calibration": Calibration(
            dataset="mathqa",
            split="calibration",
            examples=1,
            tokens=9,
            data_sha256="0" * 64,
            seed=0,
        ),
        "evidence": Evidence(
            objective="mean KL(full || evicted), nats",
            dataset="mathqa",
            split="validation",
            examples=1,
            confidence=0.95,
            table=figure,
            baselines={"uniform": figure},
            paired={"uniform": figure},
            p_holm={"uniform": 0.5},
            uniform=UniformSetting(alpha=0.9, recent_share=0.25, sinks=4),
            verdict="no_better_than_uniform",
        ),
        "search": Search(
            sampler="none",
            trials=0,
            study="made-up",
            storage="none",
            wall_seconds=0.0,
            stages=(),
        ),
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "tool_version": "0",
    }


def make_table(identity: ModelIdentity, *, name: str = "made-up", **policy: Any) -> AlphaTable:
    """A sealed table for the model of `identity`."""
    return seal(**table_fields(identity, name=name, **policy))
