"""How fast, how many and at what price: times by the roofline or as measured, replicas, cost.

Owns the arithmetic of time. A roofline is an upper bound: a step takes at least as long as its
bytes at the memory's published bandwidth and its operations at the processor's published peak, and
launches, sampling and whatever else a step does come on top. It takes for granted that what a step
moves does not fit into the processor's own caches. Knows nothing of what fits into memory.
"""

import math
from dataclasses import dataclass
from typing import Literal

from a2sf import capacity
from a2sf.errors import InvalidArgument
from service.plan.sizing import Sizing


@dataclass(frozen=True, kw_only=True)
class Means:
    """What times are taken from; a measured time goes before a bound."""

    bandwidth: int | None
    """Bytes a second, as published."""
    compute: int | None
    """Multiplications and additions a second, as published."""
    step_s: float | None
    """A decode step of all planned rows, as measured."""
    prefill_tokens_per_s: float | None
    """Prompt tokens a second while nothing else runs, as measured."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is to be served, and how far a replica may be filled."""

    requests_per_s: float | None
    tokens_per_s: float | None
    """Completion tokens a second; their prompts count where lengths are stated."""
    prompt_tokens: int | None
    completion_tokens: int | None
    utilisation: float
    """The share of its time that a replica is planned to be busy."""
    price_per_hour: float | None
    """Of one replica, in any currency."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """One way of caching, all rows at work."""

    rows: int
    step_nbytes: int
    """Bytes that a decode step must move."""
    scores_nbytes: int
    """Those of them that scoring costs: positions and scores read, scores written."""
    step_operations: int
    """Multiplications and additions of a decode step."""
    step_s: float
    taken_from: Literal["memory", "compute", "measured"]
    """What the step's time is: the bound that is the higher, or a measurement."""
    prompt_s: float | None
    """Reading one prompt; None: no prompts are stated."""
    replicas: int | None
    """None: no load is stated."""
    price_per_million: float | None
    """Of completion tokens; None: no price is stated."""

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens of all rows together, while no prompt is read."""
        return self.rows / self.step_s


def check(means: Means, load: Load) -> None:
    """Refuse loads whose times cannot be told from `means`. Raises InvalidArgument."""
    if load.requests_per_s is not None and load.tokens_per_s is not None:
        raise InvalidArgument("--requests-per-s", "goes not with --tokens-per-s; give one load")
    if load.requests_per_s is not None and not (load.prompt_tokens and load.completion_tokens):
        raise InvalidArgument(
            "--requests-per-s", "needs --prompt-tokens and --completion-tokens of a request"
        )
    if load.prompt_tokens and not load.completion_tokens:
        raise InvalidArgument("--prompt-tokens", "needs --completion-tokens beside it")
    if load.prompt_tokens and means.compute is None and means.prefill_tokens_per_s is None:
        raise InvalidArgument(
            "--prompt-tokens",
            "reading them takes time too: give --gpu, --compute or --prefill-tokens-per-s",
        )
    wants = (load.requests_per_s, load.tokens_per_s, load.prompt_tokens, load.price_per_hour)
    if means.bandwidth is None and means.step_s is None and any(wants):
        raise InvalidArgument(
            "--bandwidth",
            "missing; a load or a price needs a step's time: give --gpu, --bandwidth or --step-ms",
        )


def check_lengths(sizing: Sizing, load: Load) -> None:
    """Refuse requests that the planned server would refuse. Raises InvalidArgument."""
    if not (load.prompt_tokens and load.completion_tokens):
        return
    longest, length = sizing.spec.shape.max_context, load.prompt_tokens + load.completion_tokens
    if length > longest:
        raise InvalidArgument(
            "--prompt-tokens",
            f"with the completion {length} tokens; the model's context is {longest}",
        )
    if load.prompt_tokens > sizing.staging_slots:
        raise InvalidArgument(
            "--prompt-tokens",
            f"{load.prompt_tokens}; prompts are planned to be read exactly, and the staging row "
            f"holds {sizing.staging_slots}; give --max-prefill-tokens {load.prompt_tokens} or more",
        )


def ours(sizing: Sizing, means: Means, load: Load) -> Pace | None:
    """The planned server with every row at its budget; None: no times are asked for."""
    tokens = sizing.held
    operations = capacity.attention_operations(sizing.spec, tokens) + sum(
        capacity.scoring_operations(sizing.spec, tokens)
    )
    return _pace(
        sizing,
        means,
        load,
        rows=sizing.rows,
        row_nbytes=capacity.held_nbytes(sizing.spec, tokens),
        row_scores_nbytes=tokens * capacity.SCORED_SLOT_BYTES,
        row_operations=operations,
    )


def full(sizing: Sizing, means: Means, load: Load) -> Pace | None:
    """A cache that keeps every token, with every row at its whole context.

    None: no times are asked for, none fits, or the step's time was measured, which says nothing of
    another cache.
    """
    if means.step_s is not None or sizing.full_rows == 0:
        return None
    return _pace(
        sizing,
        means,
        load,
        rows=sizing.full_rows,
        row_nbytes=sizing.full_sequence,
        row_scores_nbytes=0,
        row_operations=capacity.attention_operations(sizing.spec, sizing.full_tokens),
    )


def _pace(
    sizing: Sizing,
    means: Means,
    load: Load,
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
    if means.step_s is not None:
        bounds["measured"] = means.step_s
    elif means.bandwidth is not None:
        bounds["memory"] = step_nbytes / means.bandwidth
        if means.compute is not None:
            bounds["compute"] = step_operations / means.compute
    else:
        return None
    taken_from = max(bounds, key=bounds.__getitem__)
    step_s = bounds[taken_from]
    prompt_s = _prompt_s(sizing, means, load)
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


def _prompt_s(sizing: Sizing, means: Means, load: Load) -> float | None:
    if load.prompt_tokens is None:
        return None
    if means.prefill_tokens_per_s is not None:
        return load.prompt_tokens / means.prefill_tokens_per_s
    assert means.compute is not None
    operations = capacity.prompt_operations(sizing.spec, sizing.weights, load.prompt_tokens)
    return operations / means.compute
