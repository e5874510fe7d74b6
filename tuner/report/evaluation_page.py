"""Writes the HTML report of an evaluation: one file without scripts or external resources.

Owns the contents, their order and their wording; `page.html.j2` is the layout. Knows nothing of how
figures are measured or pictures drawn.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup

from tuner.evaluation.results import METRICS, SIGNIFICANT, Cell, Evaluation, Metric, Size
from tuner.report import heatmaps, pictures, skeleton
from tuner.report.skeleton import Panels, Picture
from tuner.report.styles import kind_of

DECIMALS: dict[Metric, int] = {"kl": 4, "nll": 4, "top1": 3, "accuracy": 3, "similarity": 3}
"""Decimals in tables: shares and cosines need fewer than nats."""


def render(evaluation: Evaluation) -> str:
    """Write the whole page; the same document always gives the same text."""
    tasks = [task.name for task in evaluation.tasks]
    return skeleton.render(
        "page.html.j2",
        evaluation=evaluation,
        sizes={task: _sizes(evaluation, task) for task in tasks},
        metrics={task: pictures.metrics_of(evaluation, task) for task in tasks},
        conclusions=[_conclusion(evaluation, task) for task in tasks],
        panels={
            task: curves(evaluation, task, f"task-{place}") for place, task in enumerate(tasks)
        },
        maps={task: _maps(evaluation, task, f"task-{place}") for place, task in enumerate(tasks)},
        tables=[
            (policy, alpha_picture(policy.name, policy.alpha, f"table-{place}"))
            for place, policy in enumerate(evaluation.policies)
            if policy.alpha is not None
        ],
        lowest={task: _lowest(evaluation, task) for task in tasks},
        main_comparisons={
            task: [
                row
                for size in _sizes(evaluation, task)
                for row in evaluation.main_comparisons(task, size)
            ]
            for task in tasks
        },
        all_sizes=_sizes(evaluation, *tasks),
        definitions=METRICS,
        decimals=DECIMALS,
        significant=SIGNIFICANT,
    )


def _sizes(evaluation: Evaluation, *tasks: str) -> list[Size]:
    """Every size of the tasks, ratios first, small to large."""
    found = {cell.size for cell in evaluation.cells if cell.task in tasks and cell.size}
    return sorted(found, key=lambda size: (size.ratio or math.inf, size.slots or 0))


def _lowest(evaluation: Evaluation, task: str) -> dict[Size, Cell]:
    """The cell with the lowest mean KL at each size, without the full cache."""
    return {
        size: min(
            (cell for cell in evaluation.cells if cell.task == task and cell.size == size),
            key=lambda cell: cell.kl.mean,
        )
        for size in _sizes(evaluation, task)
    }


def _main_size(evaluation: Evaluation, task: str) -> Size | None:
    """The size that the first table was fitted at, if it was measured; else the smallest one."""
    sizes = _sizes(evaluation, task)
    fitted = (policy.fitted_at for policy in evaluation.policies)
    return next((size for size in fitted if size in sizes), next(iter(sizes), None))


def _conclusion(evaluation: Evaluation, task: str) -> str:
    """State in one sentence which policy loses least at the main size, compared with others.

    The others are tables, the best uniform setting, h2o and window. The comparisons show whether a
    lead is significant.
    """
    size = _main_size(evaluation, task)
    if size is None:
        return f"{task}: only the full cache was run, so nothing was lost."
    best = _lowest(evaluation, task)[size]
    full = next((cell for cell in evaluation.cells if cell.task == task and not cell.size), None)
    others = [cell for cell in _shown_cells(evaluation, task, size) if cell.policy != best.policy]
    beside = ", ".join(f"{cell.policy} {skeleton.number(cell.kl.mean, 3)}" for cell in others)
    words = (
        f"{task}, {size}: {best.policy} stays closest to the full cache, with a KL of "
        f"{skeleton.number(best.kl.mean, 3)} nats"
    )
    if beside:
        words += f" ({beside})"
    if best.accuracy is not None and full is not None and full.accuracy is not None:
        words += (
            f"; it answers {best.accuracy.mean:.1%} of the questions right, the full cache "
            f"{full.accuracy.mean:.1%}"
        )
    return words + "."


def curves(evaluation: Evaluation, task: str, salt: str) -> list[Panels]:
    """Draw each metric over the sizes: once for ratios and once for slots, if there are any.

    If a unit has one size only, dots replace the curves.
    """
    sizes, drawn = _sizes(evaluation, task), []
    for unit in ("ratio", "slots"):
        alike = [size for size in sizes if getattr(size, unit) is not None]
        if not alike:
            continue
        several = len(alike) > 1
        where = f"over the size of the cache ({unit})" if several else f"at {alike[0]}"
        panels = []
        for metric in pictures.metrics_of(evaluation, task):
            label, name = f"{task}: {pictures.TITLES[metric]} {where}", f"{salt}-{unit}-{metric}"
            if several:
                svg = pictures.curves(evaluation, task, alike, [metric], label=label, salt=name)
            else:
                svg = pictures.intervals(evaluation, task, alike[0], metric, label=label, salt=name)
            panels.append(Picture(Markup(svg)))
        words = f"Each metric {where}, a {'line' if several else 'dot'} for each policy. "
        if several and any(policy.name.startswith("a2sf:") for policy in evaluation.policies):
            words += (
                "Of the uniform settings (a2sf), those that are best at some size have names; the "
                "others are thin and grey. "
            )
        words += (
            f"Bands and bars are {evaluation.confidence:.0%} intervals; dashed is the full "
            "cache. A KL of zero lies beyond the end of its axis."
        )
        drawn.append(Panels(tuple(panels), words))
    return drawn


def _maps(evaluation: Evaluation, task: str, salt: str) -> list[Panels]:
    sizes, drawn = _sizes(evaluation, task), []
    if len(sizes) > 1:
        words = "KL to the full cache by policy and size, nats; dark is far from the full cache"
        svg = heatmaps.kl_map(evaluation, task, sizes, label=f"{task}: {words}", salt=f"{salt}-kl")
        drawn.append(Panels((Picture(Markup(svg)),), f"{words}."))
    size = _main_size(evaluation, task)
    if size is not None and (cells := _shown_cells(evaluation, task, size)):
        words = (
            f"Attention similarity by layer and KV head at {size}; dark heads lose most of "
            "the attention that they had with the full cache"
        )
        labels = [f"{task}, {cell.policy}: {words}" for cell in cells]
        maps = heatmaps.head_maps(cells, labels=labels, salt=f"{salt}-heads")
        drawn.append(Panels(tuple(Picture(Markup(svg)) for svg in maps), f"{words}."))
    return drawn


def _shown_cells(evaluation: Evaluation, task: str, size: Size) -> list[Cell]:
    """At most four cells whose heads are shown: a table, the best a2sf, h2o, window."""
    kinds: dict[str, Cell] = {}
    if best := evaluation.best_a2sf(task, size):
        kinds["a2sf"] = best
    for policy in evaluation.policies:
        cell = evaluation.cell(task, policy.name, size)
        if cell is not None and cell.size is not None:
            kinds.setdefault(kind_of(policy), cell)
    chosen = [kinds[kind] for kind in ("table", "a2sf", "h2o", "window") if kind in kinds]
    return chosen or list(kinds.values())[:1]


def alpha_picture(name: str, alpha: Sequence[Sequence[float]], salt: str) -> Picture:
    """Draw a table's alphas and half-lives."""
    words = (
        "Alpha by layer and KV head, coloured by log tau, tau = 1 / (1 - alpha); where there is "
        "room, the half-life of a score in tokens is below alpha. 0: only the last query "
        "counts; 1: no score fades"
    )
    svg = heatmaps.alpha_map(alpha, label=f"{name}: {words}", salt=salt)
    return Picture(Markup(svg), f"{words}.")
