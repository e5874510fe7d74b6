"""Writes the HTML report of a fitted table: its value, its contents, and the search.

Owns the contents, their order and wording, and which evaluation may be shown with a table;
`table.html.j2` is the layout. Knows nothing of how figures are measured or drawn.
"""

from itertools import accumulate
from pathlib import Path

from markupsafe import Markup
from pydantic import ValidationError

from a2sf.errors import InvalidArgument, NotFound
from a2sf.schema import AlphaTable
from tuner.evaluation.results import Comparison, Evaluation
from tuner.progress import duration
from tuner.report import heatmaps, skeleton, table_pictures
from tuner.report.evaluation_page import alpha_picture, curves
from tuner.report.sentences import (
    advice_line,
    calibration_line,
    carries_uniform,
    caution_line,
    half_life,
    policy_line,
    setting_words,
    slots,
    verdict_line,
)
from tuner.report.skeleton import Panels, Picture


def load_evaluation(path: Path, table: AlphaTable) -> Evaluation:
    """Read a file of `evaluate --json`, and check that it contains `table`.

    Raises NotFound if the file cannot be read, and InvalidArgument if it is not an evaluation, is
    of another model, or did not compare this table.
    """
    option = "--evaluation"
    try:
        found = Evaluation.model_validate_json(path.read_bytes())
    except OSError as error:
        raise NotFound(f"{option} {path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        problem = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise InvalidArgument(
            option, f"{path} is not what evaluate --json writes: {problem}"
        ) from error
    if table.sha256 in {policy.sha256 for policy in found.policies}:
        # The evaluation has checked the table against its model, perhaps with a newer fingerprint.
        return found
    if found.model.fingerprint != table.model.fingerprint:
        raise InvalidArgument(
            option,
            f"{path} is of model {found.model.id!r} (fingerprint {found.model.fingerprint[:12]}...)"
            f", and table {table.name!r} was made for {table.model.id!r} "
            f"({table.model.fingerprint[:12]}...); evaluate the table with its own model",
        )
    raise InvalidArgument(
        option,
        f"{path} did not compare table {table.name!r} (sha256 {table.sha256[:12]}...) but "
        f"{', '.join(policy.name for policy in found.policies)}; "
        "name the table's file among the --policies of evaluate",
    )


def render(table: AlphaTable, evaluation: Evaluation | None = None) -> str:
    """Write the whole page; the same table and evaluation always give the same text.

    An evaluation is one that `load_evaluation` accepts.
    """
    evidence, found = table.evidence, table.search.stages
    multiples = slots(table.policy)
    return skeleton.render(
        "table.html.j2",
        table=table,
        verdict=verdict_line(table),
        advice=advice_line(table),
        caution=caution_line(table),
        policy=policy_line(table.policy),
        calibration=calibration_line(table),
        uniform=setting_words(evidence.uniform) if evidence.uniform else "",
        carries_uniform=carries_uniform(table),
        costs=_costs(table),
        heads=_heads(table),
        multiples=multiples,
        half_life=half_life,
        stages=_stages(table) if found else None,
        time=_time(table),
        ends=list(accumulate(stage.evaluations for stage in found)),
        evaluation=evaluation,
        evaluated=_evaluated(evaluation, table) if evaluation else [],
    )


def _heads(table: AlphaTable) -> Panels:
    """The alphas, and beside them the slots if those differ."""
    alphas = alpha_picture(table.name, table.policy.alpha, "alphas")
    multiples = slots(table.policy)
    if not multiples:
        return Panels((Picture(alphas.svg),), alphas.caption)
    words = "Slots by layer and KV head, in multiples of the budget"
    slot_picture = heatmaps.slot_map(multiples, label=f"{table.name}: {words}", salt="slots")
    return Panels(
        (Picture(Markup(slot_picture)), Picture(alphas.svg)), f"{words}. {alphas.caption}"
    )


def _costs(table: AlphaTable) -> Picture:
    evidence = table.evidence
    words = (
        "Held-out cost of the fitted table and of each baseline at the same budget; bars are "
        f"{evidence.confidence:.0%} intervals, dashed is the best uniform setting"
    )
    svg = table_pictures.costs(evidence, label=f"{table.name}: {words}", salt="costs")
    return Picture(Markup(svg), f"{words}.")


def _stages(table: AlphaTable) -> Picture:
    names = ", ".join(f"{n} {stage.name}" for n, stage in enumerate(table.search.stages, 1))
    words = (
        "Cost over the evaluations spent. Steps: lowest cost on the calibration examples so far; "
        "points: the cost of that candidate on the held-out examples, with "
        f"{table.evidence.confidence:.0%} intervals. Numbers mark the ends of the stages: {names}"
    )
    svg = table_pictures.stages(
        table.search.stages, table.evidence, label=f"{table.name}: {words}", salt="stages"
    )
    return Picture(Markup(svg), f"{words}.")


def _time(table: AlphaTable) -> str:
    """State the time of the search and its parts in a sentence."""
    search = table.search
    took = f"The search took {duration(search.wall_seconds)}"
    spent = sum(stage.seconds for stage in search.stages)
    if not spent:
        return f"{took}."
    shares = ", ".join(f"{s.name} {s.seconds / spent:.1%}" for s in search.stages)
    return f"{took}. Measuring took {duration(spent)}, summed over workers: {shares}."


def _evaluated(
    evaluation: Evaluation, table: AlphaTable
) -> list[tuple[str, list[Panels], list[Comparison]]]:
    """For each task: its name, its curves, and the comparisons of this table's KL."""
    names = {policy.name for policy in evaluation.policies if policy.sha256 == table.sha256}
    return [
        (
            task.name,
            curves(evaluation, task.name, f"task-{place}"),
            [
                row
                for row in evaluation.comparisons
                if (row.task, row.metric) == (task.name, "kl") and row.policy in names
            ],
        )
        for place, task in enumerate(evaluation.tasks)
    ]
