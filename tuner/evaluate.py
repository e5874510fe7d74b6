"""Compares policies with the full cache, by task and size.

Owns the plan of cells (task x size x policy) and the passes that fill them. Examples run in
batches. All policies run on one batch before the next is made, so the full cache's predictions are
kept for one batch only. Knows nothing of command lines or drawing.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from a2sf import __version__
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from a2sf.offline.prompts import Prompt
from a2sf.offline.teacher_forcing import Example, Prediction
from a2sf.policy import EffectivePolicy
from tuner.data import datasets, packing
from tuner.data.packing import Item
from tuner.evaluation import machine, policy_specs, statistics
from tuner.evaluation.cells import Gathered, Plan, cell_of, compare
from tuner.evaluation.objective import (
    ROWS_PER_PASS,
    check_finite,
    divergence,
    effective,
    full_cache,
    log_likelihoods,
    read_prompts,
)
from tuner.evaluation.policy_specs import Named
from tuner.evaluation.results import Accuracy, Evaluation, Policy, Size, Task
from tuner.progress import Progress

STEP_BY_STEP = 1
"""Default prompt block for questions asked one by one: prompts are pruned as in the paper."""

EXACT = 0
"""Default prompt block for packed sequences, as in fits and in the server."""


@dataclass(frozen=True)
class Settings:
    """The request of the user."""

    datasets: tuple[str, ...]
    policies: str
    sizes: tuple[Size, ...]
    shots: tuple[int | None, ...]
    """Solved examples before each question; None packs several questions into each sequence."""
    examples: int
    length: int
    split: str
    prefill_chunk: int | None
    """None: `STEP_BY_STEP` with shots, else `EXACT`."""
    seed: int
    data_dir: Path | None
    model: str
    revision: str | None
    device: str
    dtype: str
    command: str


def evaluate(settings: Settings) -> Evaluation:
    """Measure every cell.

    Raises A2SFError, before the first pass, for errors that the user can correct.
    """
    began = time.monotonic()
    sources = [
        datasets.load(name, datasets.data_directory(settings.data_dir))
        for name in settings.datasets
    ]
    model = load_model(
        settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype
    )
    teacher_forcing.prepare(model)
    wanted = policy_specs.parse(settings.policies, model)
    plans = [
        _plan(model, source, shots, wanted, settings)
        for source in sources
        for shots in settings.shots
    ]
    for plan in plans:
        for policy, size in plan.cells:
            for item in plan.items:
                for example in (item.example, *item.alternatives):
                    _resolve(model, plan.task, policy, size, example, settings.seed)
    with Progress("task", [plan.task.name for plan in plans]) as progress:
        for source in sources:
            progress.say(f"Data: {source.told}.")
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
            )
            for policy in wanted
        ),
        cells=tuple(
            cell_of(plan.task, policy, size, gathered, settings.seed)
            for plan in plans
            for (policy, size), gathered in plan.cells.items()
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
    source: datasets.Dataset,
    shots: int | None,
    wanted: Sequence[Named],
    settings: Settings,
) -> Plan:
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
            f"{source.name} gives {len(items)}; lower --examples, or change --length",
        )
    kinds = {_judged_by(item) for item in items}
    kind = kinds.pop() if len(kinds) == 1 else None
    questions = 0
    if kind is not None:
        questions = sum(1 if item.alternatives else len(item.answers) for item in items)
    chunk = settings.prefill_chunk
    if chunk is None:
        chunk = EXACT if shots is None else STEP_BY_STEP
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
    cells: dict[tuple[Named, Size | None], Gathered] = {}
    for policy in wanted:
        for size in settings.sizes if policy.has_size else (None,):
            cells[policy, size] = Gathered()
    return Plan(task, items, cells)


def _judged_by(item: Item) -> Accuracy | None:
    if item.alternatives:
        return "likeliest choice"
    return "exact greedy answer" if item.answers else None


def _resolve(
    model: LoadedModel,
    task: Task,
    policy: Named,
    size: Size | None,
    example: Example,
    seed: int,
) -> EffectivePolicy:
    candidate = policy.at(size, prefill_chunk=task.prefill_chunk, seed=seed)
    length = len(example.token_ids)
    try:
        return effective(candidate, model, length)
    except InvalidArgument as error:
        raise InvalidArgument(
            "--slots" if size is not None and size.slots is not None else "--ratios",
            f"{policy.name} at {size}, on {task.name}, with an example of {length} tokens: {error}",
        ) from error


def _run_all(model: LoadedModel, plans: Sequence[Plan], seed: int, progress: Progress) -> None:
    passes = sum(-(-len(plan.items) // ROWS_PER_PASS) * len(plan.cells) for plan in plans)
    cells = sum(len(plan.cells) for plan in plans)
    progress.say(
        f"Evaluating on {len(plans)} task{'s' if len(plans) > 1 else ''}: {cells} policies at "
        f"their sizes, {passes} passes; how long they take is told after the first."
    )
    began, done = time.monotonic(), 0
    for plan in plans:
        progress.begin(plan.task.name)
        for _ in _run(model, plan, seed):
            done += 1
            spent = time.monotonic() - began
            progress.show(f"pass {done} of {passes}", spent, spent / done * (passes - done))


def _run(model: LoadedModel, plan: Plan, seed: int) -> Iterator[None]:
    """Fill the cells of a plan; yields once for each batch and policy."""
    for first in range(0, len(plan.items), ROWS_PER_PASS):
        batch = plan.items[first : first + ROWS_PER_PASS]
        examples = [item.example for item in batch]
        full = full_cache(model, examples)
        # Reading prompts beforehand costs as much as it saves if only one policy follows.
        several = plan.task.prefill_chunk == EXACT and len(plan.cells) > 1
        prompts = read_prompts(model, examples) if several else None
        at_once = max(1, ROWS_PER_PASS // len(batch))
        for size in dict.fromkeys(size for _, size in plan.cells):
            chosen = [cell for cell in plan.cells if cell[1] == size]
            for start in range(0, len(chosen), at_once):
                group = chosen[start : start + at_once]
                _pass(model, plan, group, batch, full, prompts, seed)
                for _ in group:
                    yield


def _pass(
    model: LoadedModel,
    plan: Plan,
    group: Sequence[tuple[Named, Size | None]],
    batch: Sequence[Item],
    full: Sequence[Tensor],
    prompts: Sequence[Prompt] | None,
    seed: int,
) -> None:
    """Run a few policies of one size along one batch, with all their rows in one pass."""

    def resolved(example: Example, cell: tuple[Named, Size | None]) -> EffectivePolicy:
        return _resolve(model, plan.task, *cell, example, seed)

    rows = [(cell, index) for cell in group for index in range(len(batch))]
    examples = [batch[index].example for _, index in rows]
    chosen = [resolved(example, cell) for (cell, _), example in zip(rows, examples, strict=True)]
    # A table sets its own prefill_chunk.
    known = prompts and all(policy.prefill_chunk == EXACT for policy in chosen)
    found = teacher_forcing.predict(
        model,
        examples,
        chosen,
        similarity=True,
        prompts=[prompts[index] for _, index in rows] if prompts and known else None,
    )
    for (cell, index), policy, prediction in zip(rows, chosen, found, strict=True):
        gathered = plan.cells[cell]
        gathered.budget.append(policy.budget)
        _measure(gathered, batch[index], prediction, full[index])
        if plan.task.accuracy == "exact greedy answer":
            gathered.add("accuracy", _exact(batch[index], prediction))
    if plan.task.accuracy == "likeliest choice":
        asked = [(cell, index, e) for cell, index in rows for e in batch[index].alternatives]
        chosen = [resolved(example, cell) for cell, _, example in asked]
        scores = [
            float(log_likelihoods(example, prediction.logits.log_softmax(dim=-1)).sum())
            for (_, _, example), prediction in zip(
                asked,
                teacher_forcing.predict(model, [example for _, _, example in asked], chosen),
                strict=True,
            )
        ]
        for (_, _, example), score in zip(asked, scores, strict=True):
            check_finite(example, "log-likelihood of a choice", score)
        at = iter(scores)
        for cell, index in rows:
            values = [next(at) for _ in batch[index].alternatives]
            right = values.index(max(values)) == batch[index].right
            plan.cells[cell].add("accuracy", float(right))


def _measure(gathered: Gathered, item: Item, prediction: Prediction, full: Tensor) -> None:
    example = item.example
    kl, nll = divergence(example, prediction, full)
    greedy = prediction.logits.argmax(dim=-1).cpu()
    assert prediction.similarity is not None
    gathered.add("kl", kl)
    gathered.add("nll", nll)
    gathered.add("top1", float((greedy == full.argmax(dim=-1).cpu()).double().mean()))
    gathered.add("similarity", float(prediction.similarity.mean()))
    gathered.similarity.append(prediction.similarity)


def _exact(item: Item, prediction: Prediction) -> float:
    """The share of answers that greedy decoding would reproduce token for token."""
    example = item.example
    wanted = torch.tensor([example.token_ids[position + 1] for position in example.counted])
    right = (prediction.logits.argmax(dim=-1).cpu() == wanted).tolist()
    exact = [all(right[index] for index in answer) for answer in item.answers]
    return sum(exact) / len(exact)
