"""Alpha tables for tests, whole and sealed, with made-up provenance."""

import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from a2sf.schema import (
    AlphaTable,
    Calibration,
    Estimate,
    Evidence,
    ModelIdentity,
    Search,
    Stage,
    TablePolicy,
    UniformSetting,
)
from a2sf.tablefile import canonical_digest, parse_table, seal

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
    """All fields but version and digest, with `policy` over the defaults of its kind.

    `layer_share` [layers] stands for a `head_share` that is equal within each layer.
    """
    if "layer_share" in policy:
        policy["head_share"] = by_layer(identity, policy.pop("layer_share"))
    settings: dict[str, Any] = {
        "alpha": random_alpha(identity),
        "head_share": ((1.0,) * identity.num_kv_heads,) * identity.num_layers,
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
            lost_nll=None,
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


def by_layer(identity: ModelIdentity, shares: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Shares of layers as shares of heads."""
    return tuple((share,) * identity.num_kv_heads for share in shares)


def make_table(identity: ModelIdentity, *, name: str = "made-up", **policy: Any) -> AlphaTable:
    """A sealed table for the model of `identity`."""
    return seal(**table_fields(identity, name=name, **policy))


STAGES = (
    Stage(
        name="uniform",
        trials=88,
        evaluations=40.5,
        seconds=300.0,
        calibration=0.052,
        held_out=Estimate(mean=0.061, low=0.055, high=0.07),
        paired=Estimate(mean=0.0, low=0.0, high=0.0),
    ),
    Stage(
        name="slots of layers",
        trials=31,
        evaluations=22.25,
        seconds=450.0,
        calibration=0.043,
        held_out=Estimate(mean=0.051, low=0.046, high=0.059),
        paired=Estimate(mean=-0.01, low=-0.013, high=-0.007),
    ),
    Stage(
        name="alphas of heads",
        trials=200,
        evaluations=148.75,
        seconds=2250.0,
        calibration=0.037,
        held_out=Estimate(mean=0.048, low=0.044, high=0.056),
        paired=Estimate(mean=-0.013, low=-0.017, high=-0.009),
    ),
)
"""A search from the best uniform setting downwards."""

BASELINES = {
    "uniform": (0.061, 0.0002),
    "h2o": (0.412, 0.001),
    "window": (0.128, 0.00125),
    "tova_per_head": (0.233, 0.0015),
    "random": (0.907, 0.00175),
}
"""Cost and p-value of each."""


def fitted_table(identity: ModelIdentity, *, seed: int = 0, **updates: Any) -> AlphaTable:
    """A table as a long fit leaves it: unequal slots, stages, five baselines, a win."""
    rng = random.Random(seed)
    fields = table_fields(
        identity,
        name="fitted",
        layer_share=tuple(round(rng.uniform(0.3, 2.5), 3) for _ in range(identity.num_layers)),
        alpha=tuple(
            tuple(round(1 - 10 ** rng.uniform(-3, -0.2), 4) for _ in range(identity.num_kv_heads))
            for _ in range(identity.num_layers)
        ),
        budget=None,
        budget_ratio=0.2,
        recent=None,
        recent_share=0.5,
        sinks=4,
    )
    ours = STAGES[-1].held_out
    fields["evidence"] = Evidence(
        objective="mean KL(full cache || evicted cache) of the next-token distribution, nats",
        dataset="mathqa",
        split="validation",
        examples=96,
        confidence=0.95,
        table=ours,
        baselines={name: spread(cost) for name, (cost, _) in BASELINES.items()},
        paired={name: gap(ours.mean - cost) for name, (cost, _) in BASELINES.items()},
        p_holm={name: p for name, (_, p) in BASELINES.items()},
        lost_nll=None,
        uniform=UniformSetting(alpha=0.93, recent_share=0.5, sinks=4),
        verdict="better",
    )
    fields["search"] = Search(
        sampler="CMA-ES in log tau",
        trials=319,
        study="fitted",
        storage="journal",
        wall_seconds=1530.0,
        stages=STAGES,
    )
    return seal(**{**fields, **updates})


def not_better(*, kept: bool, **evidence: Any) -> AlphaTable:
    """A fit whose table is not shown to be better; all its figures differ from the uniform ones.

    The file carries the uniform setting, or with `kept` the fitted table.
    """
    table = fitted_table(IDENTITY)
    uniform = table.evidence.uniform
    assert uniform is not None
    changes = {
        "verdict": "no_better_than_uniform",
        "table": spread(0.052),
        "lost_nll": spread(0.011),
        "baselines": {**table.evidence.baselines, "uniform": spread(0.3048)},
        **evidence,
    }
    policy = table.policy
    if not kept:
        rows = IDENTITY.num_layers, IDENTITY.num_kv_heads
        policy = policy.model_copy(
            update={
                "alpha": ((uniform.alpha,) * rows[1],) * rows[0],
                "head_share": ((1.0,) * rows[1],) * rows[0],
                "recent_share": uniform.recent_share,
                "sinks": uniform.sinks,
            }
        )
    return table.model_copy(
        update={"policy": policy, "evidence": table.evidence.model_copy(update=changes)}
    )


def spread(mean: float) -> Estimate:
    """A cost with an interval about it."""
    return Estimate(mean=mean, low=round(mean * 0.91, 6), high=round(mean * 1.14, 6))


def gap(mean: float) -> Estimate:
    """A difference whose interval keeps to its side of 0."""
    first, second = round(mean * 0.75, 6), round(mean * 1.2, 6)
    return Estimate(mean=mean, low=min(first, second), high=max(first, second))


def version_2(identity: ModelIdentity) -> dict[str, Any]:
    """The document of a table from before version 3, without what that brought."""
    old = {**make_table(identity).model_dump(mode="json"), "schema_version": 2}
    del old["policy"]["head_share"], old["policy"]["min_budget"], old["evidence"]["lost_nll"]
    old["policy"]["layer_share"] = [1.0 + 0.5 * layer for layer in range(identity.num_layers)]
    return {**old, "sha256": canonical_digest(old)}


def version_1(identity: ModelIdentity) -> dict[str, Any]:
    """The document of a table from before version 2, without what that brought."""
    old = {**version_2(identity), "schema_version": 1}
    del old["policy"]["layer_share"]
    del old["evidence"]["p_holm"], old["evidence"]["uniform"], old["search"]["stages"]
    return {**old, "sha256": canonical_digest(old)}


def brought_up(identity: ModelIdentity) -> AlphaTable:
    """A table of version 1 as this version reads it."""
    return parse_table(json.dumps(version_1(identity)).encode())
