"""Finds the smallest budget at which a policy stays near the full cache.

Owns the measure of nearness and the bisection over budgets. Knows nothing of command lines or of
the wording of the answer.

Nearness is measured in perplexity, the exponential of the NLL: eviction may increase it by at most
a given percentage over the full cache. The upper confidence limit of the paired difference decides.
A share of the NLL itself would be meaningless if the full cache is sure of its answers: 1 % of .008
nats is less than any eviction costs. KL has no percentage. It is reported as well, because it also
covers what a model would say instead.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from a2sf import __version__
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.schema import Estimate
from tuner.data import datasets, packing
from tuner.evaluation import machine, objective, policy_specs, statistics
from tuner.evaluation.objective import Objective
from tuner.evaluation.policy_specs import PolicySpec
from tuner.evaluation.results import Policy, Size
from tuner.progress import Progress
from tuner.report.budget_answer import STEPS, BudgetSearch, Measurement, percent


@dataclass(frozen=True)
class BudgetSettings:
    """The request of the user."""

    dataset: str
    policy: str
    within: float
    """Largest accepted increase of perplexity, as a share of the full cache's."""
    up_to: float
    """Largest budget to consider, as a share of the length."""
    examples: int
    length: int
    split: str
    prefill_chunk: int
    """For a policy that does not set it; 0 is exact."""
    seed: int
    data_dir: Path | None
    model: str
    revision: str | None
    device: str
    dtype: str
    command: str


def search(settings: BudgetSettings) -> BudgetSearch:
    """Find the smallest budget. Raises A2SFError for errors that the user can correct."""
    began = time.monotonic()
    source = datasets.load(settings.dataset, datasets.data_directory(settings.data_dir))
    part = source.validation if settings.split == "validation" else source.calibration
    with Progress("measurement", about="at most about") as progress:
        progress.say(
            f"Looking for the smallest budget of {settings.policy} within "
            f"{percent(settings.within)} of the full cache on {part.split} of {source.name}: at "
            f"most {max_measurements(STEPS - 1)} measurements of {settings.examples} examples."
        )
        progress.say(f"Data: {source.description}. Measured on {settings.split}.")
        model = load_model(
            settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype
        )
        teacher_forcing.prepare(model)
        policy = _single_policy(settings.policy, model)
        examples = packing.examples(
            model, part, count=settings.examples, length=settings.length, seed=settings.seed
        )
        if len(examples) < settings.examples:
            raise InvalidArgument(
                "--examples",
                f"{settings.examples} of at most {settings.length} tokens, and {part.split} of "
                f"{source.name} gives {len(examples)}; lower --examples, add rows, "
                "or change --length (a smaller one gives more sequences)",
            )
        feasible = _feasible(policy, model, examples, settings)
        begun = time.monotonic()
        target = Objective(model, examples, label="these", on_progress=progress.show)
        measured: dict[int, Measurement] = {}

        def within(step: int) -> bool:
            max_count = max_measurements(len(feasible))
            spent = time.monotonic() - begun
            left = spent / len(measured) * (max_count - len(measured)) if measured else None
            progress.begin(
                f"measurement {len(measured) + 1} of at most {max_count}: ratio {step / STEPS:g}",
                spent,
                left,
            )
            measured[step] = _measure(target, policy, step / STEPS, settings)
            return measured[step].within

        found = smallest(feasible, within)
        full_nll = statistics.estimate(target.full_nll, seed=settings.seed)
    return BudgetSearch(
        created_at=datetime.now(UTC).replace(microsecond=0),
        tool_version=__version__,
        command=settings.command,
        machine=machine.describe(model.device, model.dtype),
        seconds=round(time.monotonic() - began, 1),
        model=model.identity,
        seed=settings.seed,
        confidence=statistics.CONFIDENCE,
        dataset=source.name,
        split=part.split,
        examples=len(examples),
        tokens=sum(len(example.token_ids) for example in examples),
        counted=sum(len(example.counted) for example in examples),
        data_sha256=packing.digest(examples),
        prefill_chunk=settings.prefill_chunk,
        policy=Policy(
            name=policy.name,
            description=policy.description,
            alpha=policy.table.policy.alpha if policy.table else None,
            sha256=policy.table.sha256 if policy.table else None,
        ),
        within=settings.within,
        up_to=settings.up_to,
        full_nll=full_nll,
        measured=tuple(measured[step] for step in sorted(measured, reverse=True)),
        ratio=None if found is None else found / STEPS,
    )


def smallest(steps: range, within: Callable[[int], bool]) -> int | None:
    """Bisect for the smallest step for which `within` holds; None if it fails for the last step.

    Tests the last step first. Assumes that `within` holds for every step above the smallest; if it
    does not, the result is a step for which it holds and the one below does not, or the first.
    """
    if not within(steps[-1]):
        return None
    low, high = steps[0] - 1, steps[-1]
    while high - low > 1:
        middle = (low + high) // 2
        if within(middle):
            high = middle
        else:
            low = middle
    return high


def max_measurements(steps: int) -> int:
    """The largest number of steps that `smallest` tests, of so many."""
    return math.ceil(math.log2(steps)) + 1


def _single_policy(written: str, model: LoadedModel) -> PolicySpec:
    try:
        found = policy_specs.parse(written, model)
    except InvalidArgument as error:
        raise InvalidArgument("POLICY", error.problem) from None
    if len(found) != 1 or not found[0].has_size:
        what = "keeps every token" if len(found) == 1 else f"is {len(found)} policies"
        raise InvalidArgument(
            "POLICY", f"{written!r} {what}; accepted: one table or policy that forgets, as a2sf:.9"
        )
    return found[0]


def _feasible(
    policy: PolicySpec, model: LoadedModel, examples: list[Example], settings: BudgetSettings
) -> range:
    """The budgets, in steps, that exceed what the policy protects, in every example."""
    lengths = {len(example.token_ids) for example in examples}

    def check(step: int) -> None:
        size = Size(ratio=step / STEPS)
        candidate = policy.at(size, prefill_chunk=settings.prefill_chunk, seed=settings.seed)
        for length in lengths:
            objective.effective(candidate, model, length)

    # At the whole length nothing is evicted, so there is nothing to measure.
    last = min(math.floor(settings.up_to * STEPS + 1e-9), STEPS - 1)
    for step in range(1, last):
        try:
            check(step)
        except InvalidArgument:
            continue
        return range(step, last + 1)
    try:
        check(last)
    except InvalidArgument as error:
        raise InvalidArgument(
            "--up-to", f"{settings.up_to:g} leaves {policy.name} no room: {error}"
        ) from None
    return range(last, last + 1)


def _measure(
    target: Objective, policy: PolicySpec, ratio: float, settings: BudgetSettings
) -> Measurement:
    candidate = policy.at(
        Size(ratio=ratio), prefill_chunk=settings.prefill_chunk, seed=settings.seed
    )
    cost = target.cost(candidate)
    nll = statistics.difference(cost.nll, target.full_nll, seed=settings.seed)
    perplexity = Estimate(
        **{name: math.expm1(min(value, 700.0)) for name, value in nll.model_dump().items()}
    )
    slots = [
        objective.effective(candidate, target.model, len(example.token_ids)).budget
        for example in target.examples
    ]
    return Measurement(
        ratio=ratio,
        slots=sum(slots) / len(slots),
        perplexity=perplexity,
        nll=nll,
        kl=statistics.estimate(cost.kl, seed=settings.seed),
        within=perplexity.high <= settings.within,
    )
