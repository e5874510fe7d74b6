"""Estimates times, replicas and cost, by the roofline model or from a measured time.

Owns the arithmetic of time. The roofline is an upper bound on speed: a step takes at least as long
as its bytes at the published memory bandwidth, and as its operations at the published peak. Launch
overhead, sampling and all other work come on top. The model assumes that the data of a step does
not fit into the processor's caches. Knows nothing of what fits into memory.
"""

import math
from dataclasses import dataclass
from typing import Literal

from a2sf.errors import InvalidArgument
from service.plan import capacity
from service.plan.sizing import Sizing


@dataclass(frozen=True, kw_only=True)
class TimeSources:
    """Sources of times; a measured time takes precedence over a bound."""

    bandwidth: int | None
    """Bytes per second, as published."""
    compute: int | None
    """Multiplications and additions per second, as published."""
    step_s: float | None
    """Seconds of a decode step of all planned rows, as measured."""
    prefill_tokens_per_s: float | None
    """Prompt tokens per second while nothing else runs, as measured."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The load to serve, and the planned utilisation of a replica."""

    requests_per_s: float | None
    tokens_per_s: float | None
    """Completion tokens per second; their prompts are included if lengths are given."""
    prompt_tokens: int | None
    completion_tokens: int | None
    utilisation: float
    """Fraction of time that a replica is busy."""
    price_per_hour: float | None
    """Price of one replica per hour, in any currency."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Speed and cost of one kind of cache, with all rows in use."""

    rows: int
    step_nbytes: int
    """Bytes that a decode step moves."""
    scores_nbytes: int
    """The part of `step_nbytes` for scores: positions and scores read, scores written."""
    step_operations: int
    """Multiplications and additions of a decode step."""
    step_s: float
    taken_from: Literal["memory", "compute", "measured"]
    """Source of `step_s`: the larger of two bounds, or a measurement."""
    prompt_s: float | None
    """Seconds of one prompt's prefill; None: no prompt length is given."""
    replicas: int | None
    """None: no load is given."""
    price_per_million: float | None
    """Price per million completion tokens; None: no price is given."""

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens per second of all rows together, while no prefill runs."""
        return self.rows / self.step_s


def check(sources: TimeSources, load: Workload) -> None:
    """Check that `sources` suffices to compute times for `load`. Raises InvalidArgument."""
    if load.requests_per_s is not None and load.tokens_per_s is not None:
        raise InvalidArgument(
            "--requests-per-s", "cannot be combined with --tokens-per-s; give one of them"
        )
    if load.requests_per_s is not None and not (load.prompt_tokens and load.completion_tokens):
        raise InvalidArgument("--requests-per-s", "needs --prompt-tokens and --completion-tokens")
    if load.prompt_tokens and not load.completion_tokens:
        raise InvalidArgument("--prompt-tokens", "needs --completion-tokens too")
    if load.prompt_tokens and sources.compute is None and sources.prefill_tokens_per_s is None:
        raise InvalidArgument(
            "--prompt-tokens",
            "prefill takes time too: give --gpu, --compute or --prefill-tokens-per-s",
        )
    wants = (load.requests_per_s, load.tokens_per_s, load.prompt_tokens, load.price_per_hour)
    if sources.bandwidth is None and sources.step_s is None and any(wants):
        raise InvalidArgument(
            "--bandwidth",
            "missing; a load or a price needs the time of a step: give --gpu, --bandwidth or "
            "--step-ms",
        )


def check_lengths(sizing: Sizing, load: Workload) -> None:
    """Refuse requests that the planned server would refuse. Raises InvalidArgument."""
    if not (load.prompt_tokens and load.completion_tokens):
        return
    longest, length = sizing.spec.shape.max_context, load.prompt_tokens + load.completion_tokens
    if length > longest:
        raise InvalidArgument(
            "--prompt-tokens",
            f"{length} tokens with the completion; the model's context is {longest}",
        )
    if load.prompt_tokens > sizing.staging_slots:
        raise InvalidArgument(
            "--prompt-tokens",
            f"{load.prompt_tokens}; the plan reads prompts exactly, and the staging row holds "
            f"{sizing.staging_slots}; give --max-prefill-tokens {load.prompt_tokens} or more",
        )


def this_cache(sizing: Sizing, sources: TimeSources, load: Workload) -> Pace | None:
    """Pace of the planned server, with every row at its budget; None without a time source."""
    tokens = sizing.cached_tokens
    operations = capacity.attention_operations(sizing.spec, tokens) + sum(
        capacity.scoring_operations(sizing.spec, tokens)
    )
    return _pace(
        sizing,
        sources,
        load,
        rows=sizing.rows,
        row_nbytes=capacity.row_step_nbytes(sizing.spec, tokens),
        row_scores_nbytes=tokens * capacity.SCORED_SLOT_BYTES,
        row_operations=operations,
    )


def full_cache(sizing: Sizing, sources: TimeSources, load: Workload) -> Pace | None:
    """Pace of a cache that keeps every token, with every row at its whole context.

    None without a time source, if no row fits, or if the step's time was measured, because that
    does not apply to another cache.
    """
    if sources.step_s is not None or sizing.full_rows == 0:
        return None
    return _pace(
        sizing,
        sources,
        load,
        rows=sizing.full_rows,
        row_nbytes=sizing.full_sequence,
        row_scores_nbytes=0,
        row_operations=capacity.attention_operations(sizing.spec, sizing.full_tokens),
    )


def _pace(
    sizing: Sizing,
    sources: TimeSources,
    load: Workload,
    *,
    rows: int,
    row_nbytes: int,
    row_scores_nbytes: int,
    row_operations: int,
) -> Pace | None:
    weights = sizing.weights
    step_nbytes = weights.step_nbytes + rows * row_nbytes
    step_operations = rows * (2 * weights.step_parameters + row_operations)
    bounds: dict[Literal["memory", "compute", "measured"], float] = {}
    if sources.step_s is not None:
        bounds["measured"] = sources.step_s
    elif sources.bandwidth is not None:
        bounds["memory"] = step_nbytes / sources.bandwidth
        if sources.compute is not None:
            bounds["compute"] = step_operations / sources.compute
    else:
        return None
    taken_from = max(bounds, key=bounds.__getitem__)
    step_s = bounds[taken_from]
    prompt_s = _prompt_s(sizing, sources, load)
    token_s = step_s / rows
    if prompt_s is not None and load.completion_tokens:
        token_s += prompt_s / load.completion_tokens
    tokens_per_s = load.tokens_per_s
    if load.requests_per_s is not None and load.completion_tokens:
        tokens_per_s = load.requests_per_s * load.completion_tokens
    planned_s = token_s / load.utilisation
    price = load.price_per_hour
    return Pace(
        rows=rows,
        step_nbytes=step_nbytes,
        scores_nbytes=rows * row_scores_nbytes,
        step_operations=step_operations,
        step_s=step_s,
        taken_from=taken_from,
        prompt_s=prompt_s,
        replicas=None if tokens_per_s is None else math.ceil(tokens_per_s * planned_s),
        price_per_million=None if price is None else price / 3600 * planned_s * 1e6,
    )


def _prompt_s(sizing: Sizing, sources: TimeSources, load: Workload) -> float | None:
    if load.prompt_tokens is None:
        return None
    if sources.prefill_tokens_per_s is not None:
        return load.prompt_tokens / sources.prefill_tokens_per_s
    assert sources.compute is not None
    operations = capacity.prompt_operations(sizing.spec, sizing.weights, load.prompt_tokens)
    return operations / sources.compute
