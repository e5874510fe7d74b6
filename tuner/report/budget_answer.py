"""The result of a search for the smallest budget: its document, and the answer in words.

Owns the fields, their units and the wording. Knows nothing of how budgets are measured.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import AwareDatetime, Field

from a2sf.schema import Count, Digest, Estimate, Frozen, Positive, Ratio, StoredIdentity
from tuner.evaluation.results import Policy
from tuner.report.sentences import columns
from tuner.settings import FEW_EXAMPLES

STEPS = 100
"""Budgets are multiples of 1 / STEPS of the length."""

LARGEST = (STEPS - 1) / STEPS
"""The largest budget that is measured: at the whole length nothing is evicted."""


SERVER_FLOOR = 128
"""Tokens that a server keeps by default, however few a ratio gives."""


class Measurement(Frozen):
    """The cost of a policy at one budget."""

    ratio: Ratio = Field(description="Slots of a head as a share of the length.")
    slots: float = Field(description="Mean slots of a head over the examples.")
    perplexity: Estimate = Field(
        description="Increase over the full cache, as a share: exp of the NLL's increase, less 1."
    )
    nll: Estimate = Field(description="The NLL's increase, nats a token, paired by example.")
    kl: Estimate = Field(description="KL to the full cache, nats.")
    within: bool = Field(
        description="Whether the upper limit of `perplexity` is within the accepted increase."
    )


class BudgetSearch(Frozen):
    """A whole search: the document that `budget --json` writes."""

    format: Literal[1] = 1
    created_at: AwareDatetime
    tool_version: str
    command: str = Field(description="The command line, without paths' directories.")
    machine: dict[str, str] = Field(description="Processor, device, threads, dtype, versions.")
    seconds: float
    model: StoredIdentity
    seed: int
    confidence: float
    dataset: str
    split: str
    examples: Positive
    tokens: Positive = Field(description="Of all examples together.")
    counted: Positive = Field(description="Positions whose predictions were compared.")
    data_sha256: Digest = Field(description="Over the token ids, prompts and counted positions.")
    prefill_chunk: Count = Field(description="For a policy that sets none; 0 is exact.")
    policy: Policy
    within: float = Field(description="Largest accepted increase of perplexity, as a share.")
    up_to: Ratio = Field(description="Largest budget considered, as a share of the length.")
    full_nll: Estimate = Field(description="With the full cache, nats a token.")
    measured: tuple[Measurement, ...] = Field(description="By falling budget.")
    ratio: Ratio | None = Field(
        description="The smallest budget within the accepted increase; None if none is. A server "
        "keeps at least its --min-budget tokens, 128 by default."
    )


def answer(found: BudgetSearch) -> str:
    """Return the answer in one sentence."""
    what = f"within {percent(found.within)} of the full cache's perplexity on {found.dataset}"
    by_ratio = {one.ratio: one for one in found.measured}
    if found.ratio is None:
        (top,) = found.measured
        end = (
            "only a cache without eviction is within it"
            if top.ratio >= LARGEST
            else "try a larger --up-to"
        )
        if top.perplexity.mean <= found.within:
            end = f"its mean is within it, so more --examples may show it; otherwise {end}"
        return (
            f"No budget up to {found.up_to:g} of the length keeps {found.policy.name} {what}: at "
            f"{top.ratio:g} perplexity is {_interval(top.perplexity)}; {end}."
        )
    chosen = by_ratio[found.ratio]
    below = by_ratio.get(round(found.ratio - 1 / STEPS, 9))
    if below is not None:
        end = f"at {below.ratio:g} it is {_interval(below.perplexity)}"
    elif found.ratio > 1 / STEPS:
        end = "a smaller budget leaves no room beside the protected tokens"
    else:
        end = "no smaller budget was considered"
    return (
        f"The smallest budget that keeps {found.policy.name} {what} is {chosen.ratio:g} of the "
        f"length ({chosen.slots:.0f} slots a head): perplexity is {_interval(chosen.perplexity)} "
        f"there, and {end}."
    )


def lines(found: BudgetSearch) -> Iterator[str]:
    """Yield the answer, what it is based on, and all measurements."""
    yield answer(found)
    if found.examples < FEW_EXAMPLES:
        yield (
            f"Few examples: {found.examples} give rough limits; measure --examples "
            f"{FEW_EXAMPLES} or more before relying on it."
        )
    if any(one.ratio == found.ratio and one.slots < SERVER_FLOOR for one in found.measured):
        yield (
            f"A server keeps at least --min-budget tokens, {SERVER_FLOOR} by default; to use fewer "
            "slots, start it with a lower --min-budget, or give min_budget in the request."
        )
    yield ""
    yield (
        f"{found.examples} examples of {found.dataset} ({found.split}), {found.tokens} tokens, "
        f"{found.counted} positions counted; {found.confidence:.0%} intervals of each budget by "
        f"itself; full cache {found.full_nll.mean:.4f} nats a token"
    )
    rows = [["budget", "slots", "perplexity", "KL to full, nats", "within"]]
    for one in found.measured:
        kl = f"{one.kl.mean:.4f} [{one.kl.low:.4f}, {one.kl.high:.4f}]"
        within = "yes" if one.within else "no"
        rows.append([f"{one.ratio:g}", f"{one.slots:.0f}", _interval(one.perplexity), kl, within])
    for line in columns(rows, right=[1]):
        yield f"  {line}"


def percent(share: float) -> str:
    """Format a share as a percentage."""
    return f"{100 * share:.4g} %"


def _interval(value: Estimate) -> str:
    # Rounded before formatting, and + 0.0, to avoid "-0.00".
    shares = (round(100 * x, 2) + 0.0 for x in (value.mean, value.low, value.high))
    mean, low, high = (f"{x:+.2f}" for x in shares)
    return f"{mean} % [{low}, {high}]"
