"""Fills the cells of an evaluation: runs the policies on batches of examples.

Owns which policies and examples share a pass, and the figures of a prediction. All policies run on
one batch before the next is made, so the full cache's predictions are kept for one batch only.
Knows nothing of how tasks are planned or progress is shown.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.prompts import Prompt
from a2sf.offline.teacher_forcing import Example, Prediction
from a2sf.policy import EffectivePolicy
from tuner.data.packing import Item
from tuner.evaluation.cells import CellFigures, TaskPlan
from tuner.evaluation.divergence import check_finite, divergence, full_cache, log_likelihoods
from tuner.evaluation.objective import ROWS_PER_PASS, effective, read_prompts
from tuner.evaluation.policy_specs import PolicySpec
from tuner.evaluation.results import Size, Task

EXACT = 0
"""The prompt block of an exact prefill: the whole prompt."""


def resolve(
    model: LoadedModel,
    task: Task,
    policy: PolicySpec,
    size: Size | None,
    example: Example,
    seed: int,
) -> EffectivePolicy:
    """Resolve a policy at a size for one example.

    Raises InvalidArgument, which names the option of the size, if it leaves no room.
    """
    candidate = policy.at(size, prefill_chunk=task.prefill_chunk, seed=seed)
    length = len(example.token_ids)
    try:
        return effective(candidate, model, length)
    except InvalidArgument as error:
        raise InvalidArgument(
            "--slots" if size is not None and size.slots is not None else "--ratios",
            f"{policy.name} at {size}, on {task.name}, with an example of {length} tokens: {error}",
        ) from error


def fill_cells(model: LoadedModel, plan: TaskPlan, seed: int) -> Iterator[None]:
    """Fill the cells of a plan; yields once for each batch and policy."""
    for first in range(0, len(plan.items), ROWS_PER_PASS):
        batch = plan.items[first : first + ROWS_PER_PASS]
        examples = [item.example for item in batch]
        full = full_cache(model, examples)
        # Reading prompts first costs as much as it saves if only one policy follows.
        several = plan.task.prefill_chunk == EXACT and len(plan.cells) > 1
        prompts = read_prompts(model, examples) if several else None
        at_once = max(1, ROWS_PER_PASS // len(batch))
        for size in dict.fromkeys(size for _, size in plan.cells):
            chosen = [cell for cell in plan.cells if cell[1] == size]
            for start in range(0, len(chosen), at_once):
                group = chosen[start : start + at_once]
                _run_pass(model, plan, group, batch, full, prompts, seed)
                for _ in group:
                    yield


def _run_pass(
    model: LoadedModel,
    plan: TaskPlan,
    group: Sequence[tuple[PolicySpec, Size | None]],
    batch: Sequence[Item],
    full: Sequence[Tensor],
    prompts: Sequence[Prompt] | None,
    seed: int,
) -> None:
    """Run a few policies of one size along one batch, with all their rows in one pass."""

    def resolved(example: Example, cell: tuple[PolicySpec, Size | None]) -> EffectivePolicy:
        return resolve(model, plan.task, *cell, example, seed)

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
        collected = plan.cells[cell]
        collected.budget.append(policy.budget)
        _measure(collected, batch[index], prediction, full[index])
        if plan.task.accuracy == "exact greedy answer":
            collected.add("accuracy", _exact(batch[index], prediction))
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


def _measure(collected: CellFigures, item: Item, prediction: Prediction, full: Tensor) -> None:
    example = item.example
    kl, nll = divergence(example, prediction, full)
    greedy = prediction.logits.argmax(dim=-1).cpu()
    assert prediction.similarity is not None
    collected.add("kl", kl)
    collected.add("nll", nll)
    collected.add("top1", float((greedy == full.argmax(dim=-1).cpu()).double().mean()))
    collected.add("similarity", float(prediction.similarity.mean()))
    collected.similarity.append(prediction.similarity)


def _exact(item: Item, prediction: Prediction) -> float:
    """The share of answers that greedy decoding would reproduce token for token."""
    example = item.example
    wanted = torch.tensor([example.token_ids[position + 1] for position in example.counted])
    right = (prediction.logits.argmax(dim=-1).cpu() == wanted).tolist()
    exact = [all(right[index] for index in answer) for answer in item.answers]
    return sum(exact) / len(exact)
