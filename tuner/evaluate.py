"""Compares policies with the full cache, by task and size.

Owns the plan: the tasks, and the cells (task x size x policy) that `tuner.evaluation.passes` fills.
Knows nothing of command lines or drawing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from a2sf import __version__
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from tuner.data import datasets, packing
from tuner.data.packing import Item
from tuner.data.parts import Dataset
from tuner.evaluation import machine, passes, policy_specs, statistics
from tuner.evaluation.cells import CellFigures, TaskPlan, compare, make_cell
from tuner.evaluation.objective import ROWS_PER_PASS
from tuner.evaluation.policy_specs import PolicySpec
from tuner.evaluation.results import Accuracy, Evaluation, Policy, Size, Task
from tuner.progress import Progress

STEP_BY_STEP = 1
"""Default prompt block for questions asked one by one: prompts are pruned as in the paper."""


@dataclass(frozen=True)
class EvaluationSettings:
    """The request of the user."""

    dataset: str
    """One dataset, or several with commas between them."""
    policies: str
    sizes: tuple[Size, ...]
    shots: tuple[int | None, ...]
    """Solved examples before each question; None packs several questions into each sequence."""
    examples: int
    length: int
    split: str
    prefill_chunk: int | None
    """None: `STEP_BY_STEP` with shots; else 0, as in fits and in the server."""
    seed: int
    data_dir: Path | None
    model: str
    revision: str | None
    device: str
    dtype: str
    command: str


def evaluate(settings: EvaluationSettings) -> Evaluation:
    """Measure every cell.

    Raises A2SFError, before the first pass, for errors that the user can correct.
    """
    began = time.monotonic()
    sources = datasets.load_all(settings.dataset, datasets.data_directory(settings.data_dir))
    model = load_model(
        settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype
    )
    teacher_forcing.prepare(model)
    policies = policy_specs.parse(settings.policies, model)
    plans = [
        _plan(model, source, shots, policies, settings)
        for source in sources
        for shots in settings.shots
    ]
    for plan in plans:
        for policy, size in plan.cells:
            for item in plan.items:
                for example in (item.example, *item.alternatives):
                    passes.resolve(model, plan.task, policy, size, example, settings.seed)
    with Progress("task", [plan.task.name for plan in plans]) as progress:
        for source in sources:
            progress.say(f"Data: {source.description}. Measured on {settings.split}.")
        _run_all(model, plans, settings.seed, progress)
    return Evaluation(
        created_at=datetime.now(UTC).replace(microsecond=0),
        tool_version=__version__,
        command=settings.command,
        machine=machine.describe(model.device, model.dtype),
        seconds=round(time.monotonic() - began, 1),
        model=model.identity,
        seed=settings.seed,
        confidence=statistics.CONFIDENCE,
        tasks=tuple(plan.task for plan in plans),
        policies=tuple(
            Policy(
                name=policy.name,
                description=policy.description,
                alpha=policy.table.policy.alpha if policy.table else None,
                sha256=policy.table.sha256 if policy.table else None,
                fitted_at=policy.fitted_at,
            )
            for policy in policies
        ),
        cells=tuple(
            make_cell(plan.task, policy, size, collected, settings.seed)
            for plan in plans
            for (policy, size), collected in plan.cells.items()
        ),
        comparisons=tuple(
            comparison
            for plan in plans
            for size in settings.sizes
            for comparison in compare(plan, size, settings.seed)
        ),
    )


def _plan(
    model: LoadedModel,
    source: Dataset,
    shots: int | None,
    policies: Sequence[PolicySpec],
    settings: EvaluationSettings,
) -> TaskPlan:
    part, other = source.validation, source.calibration
    if settings.split == "calibration":
        part, other = other, part
    items = packing.items(
        model,
        part,
        count=settings.examples,
        length=settings.length,
        seed=settings.seed,
        shots=shots,
        # Never from the measured part: a question must not appear beside its own answer.
        solved=other,
    )
    if len(items) < settings.examples:
        raise InvalidArgument(
            "--examples",
            f"{settings.examples} of at most {settings.length} tokens, and {part.split} of "
            f"{source.name} gives {len(items)}; lower --examples, add rows, "
            "or change --length (a smaller one gives more sequences)",
        )
    kinds = {_judged_by(item) for item in items}
    kind = kinds.pop() if len(kinds) == 1 else None
    questions = 0
    if kind is not None:
        questions = sum(1 if item.alternatives else len(item.answers) for item in items)
    chunk = settings.prefill_chunk
    if chunk is None:
        chunk = passes.EXACT if shots is None else STEP_BY_STEP
    form = "packed" if shots is None else f"{shots}-shot"
    examples = [item.example for item in items]
    rows = part.groups is not None or part.conversations is not None
    task = Task(
        name=f"{source.name}, {form}" if rows else source.name,
        dataset=source.name,
        split=part.split,
        shots=shots,
        prefill_chunk=chunk,
        examples=len(items),
        tokens=sum(len(example.token_ids) for example in examples),
        counted=sum(len(example.counted) for example in examples),
        questions=questions,
        accuracy=kind,
        data_sha256=packing.digest(examples),
    )
    cells: dict[tuple[PolicySpec, Size | None], CellFigures] = {}
    for policy in policies:
        for size in settings.sizes if policy.has_size else (None,):
            cells[policy, size] = CellFigures()
    return TaskPlan(task, items, cells)


def _judged_by(item: Item) -> Accuracy | None:
    if item.alternatives:
        return "likeliest choice"
    return "exact greedy answer" if item.answers else None


def _run_all(model: LoadedModel, plans: Sequence[TaskPlan], seed: int, progress: Progress) -> None:
    count = sum(-(-len(plan.items) // ROWS_PER_PASS) * len(plan.cells) for plan in plans)
    cells = sum(len(plan.cells) for plan in plans)
    progress.say(
        f"Evaluating on {len(plans)} task{'s' if len(plans) > 1 else ''}: {cells} policies at "
        f"their sizes, {count} passes; the first pass gives an estimate of the time."
    )
    began, done = time.monotonic(), 0
    for plan in plans:
        progress.begin(plan.task.name)
        for _ in passes.fill_cells(model, plan, seed):
            done += 1
            spent = time.monotonic() - began
            progress.show(f"pass {done} of {count}", spent, spent / done * (count - done))
