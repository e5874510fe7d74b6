"""Draws the pictures of an evaluation as SVG for a page: curves and intervals of each metric.

Owns the panels, their axes, and the names at the ends of curves. Knows nothing of heat maps, of the
page around a picture, or of how figures are measured. `tuner.report.svg` has the common look.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy.optimize import isotonic_regression

from a2sf.schema import Estimate
from tuner.evaluation.results import Evaluation, Metric, Size
from tuner.report.styles import Style, kind_of, styles_of
from tuner.report.svg import (
    GRID,
    INK,
    PANEL_WIDTH,
    PAPER,
    figure_style,
    log_axis,
    plain,
    to_svg,
)

TITLES: dict[Metric, str] = {
    "kl": "KL to the full cache, nats",
    "nll": "NLL, nats",
    "top1": "top-1 agreement with the full cache",
    "accuracy": "accuracy",
    "similarity": "attention similarity",
}
LOWER_IS_BETTER: tuple[Metric, ...] = ("kl", "nll")


LABEL_GAP = 11.0
"""Smallest distance between names at the ends of lines, in points."""


def metrics_of(evaluation: Evaluation, task: str) -> list[Metric]:
    """The metrics that a task has figures for, in the order they are shown."""
    cells = [cell for cell in evaluation.cells if cell.task == task]
    return [m for m in TITLES if any(getattr(cell, m) is not None for cell in cells)]


def curves(
    evaluation: Evaluation,
    task: str,
    sizes: Sequence[Size],
    metrics: Sequence[Metric],
    *,
    label: str,
    salt: str,
    heading: bool = False,
) -> str:
    """Draw one panel per metric, one line with its interval per policy, over sizes of one unit.

    Needs two or more sizes. With `heading` the label is drawn above the panels, for a picture
    without a page around it.
    """
    with figure_style(salt):
        return _panels(evaluation, task, sizes, metrics, label, 3.0, _curve, heading)


def intervals(
    evaluation: Evaluation, task: str, size: Size, metric: Metric, *, label: str, salt: str
) -> str:
    """Draw one metric at one size: a dot with its interval per policy."""
    with figure_style(salt):
        height = 0.9 + 0.22 * len(evaluation.policies)
        return _panels(evaluation, task, [size], [metric], label, height, _dots)


_Series = dict[str, list[tuple[Size, Estimate]]]
_Panel = Callable[[Axes, Metric, _Series, dict[str, Style]], None]


def _panels(
    evaluation: Evaluation,
    task: str,
    sizes: Sequence[Size],
    metrics: Sequence[Metric],
    label: str,
    height: float,
    draw: _Panel,
    heading: bool = False,
) -> str:
    styles = styles_of(evaluation, task, sizes)
    columns = min(2, len(metrics))
    rows = -(-len(metrics) // columns)
    names = [name for name in styles if any(evaluation.cell(task, name, s) for s in sizes)]
    layout = ConstrainedLayoutEngine(hspace=0.08, wspace=0.04)
    figure = Figure(figsize=(PANEL_WIDTH * columns, rows * height), layout=layout)
    places = figure.add_gridspec(rows, columns)
    # The last panel takes the rest of its row.
    last = len(metrics) - 1
    grid = [
        figure.add_subplot(
            places[n // columns, n % columns : None if n == last else n % columns + 1]
        )
        for n in range(len(metrics))
    ]
    if heading:
        figure.suptitle(label)
    full = next((p.name for p in evaluation.policies if kind_of(p) == "full"), None)
    reference = evaluation.cell(task, full, None) if full is not None else None
    for metric, axes in zip(metrics, grid, strict=True):
        series: _Series = {
            name: [
                (size, value)
                for size in sizes
                if (cell := evaluation.cell(task, name, size))
                and (value := getattr(cell, metric)) is not None
            ]
            for name in names
        }
        direction = "lower" if metric in LOWER_IS_BETTER else "higher"
        axes.set_title(f"{TITLES[metric]} ({direction} is better)")
        axes.grid(color=GRID, linewidth=0.6)
        value = getattr(reference, metric) if reference and metric in ("nll", "accuracy") else None
        if value is not None:
            _full_cache_line(axes, value.mean, sizes if draw is _curve else None)
        draw(axes, metric, series, styles)
    return to_svg(figure, label)


def _full_cache_line(axes: Axes, value: float, sizes: Sequence[Size] | None) -> None:
    """Draw the full cache's value: over the sizes of curves, or (None) across a picture of dots.

    Over curves the line ends at the largest size, so that it does not cross the names beside it.
    """
    style: dict[str, Any] = {"color": INK, "linestyle": "--", "linewidth": 1.2}
    if sizes is None:
        axes.axvline(value, **style)
    else:
        numbers = [value_of(size) for size in sizes]
        axes.plot([min(numbers), max(numbers)], [value, value], **style)


def _curve(axes: Axes, metric: Metric, series: _Series, styles: dict[str, Style]) -> None:
    shade = min(0.15, 1 / max(len(series), 1))  # lines stay visible under many overlapping bands
    sizes = sorted({size for points in series.values() for size, _ in points}, key=value_of)
    for name, points in series.items():
        style = styles[name]
        x = [value_of(size) for size, _ in points]
        if style.named:
            low, high = [e.low for _, e in points], [e.high for _, e in points]
            axes.fill_between(x, low, high, color=style.colour, alpha=shade, linewidth=0)
        axes.plot(
            x,
            [estimate.mean for _, estimate in points],
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
            linewidth=style.width,
            markersize=10 if style.marker == "*" else 6,
            markeredgecolor=PAPER,
            markeredgewidth=0.6,
            zorder=style.order,
        )
    _size_axis(axes, sizes)
    if metric == "kl":
        log_axis(axes, "y", _extent(series))
    _name_lines(axes, series, styles)


def _name_lines(axes: Axes, series: _Series, styles: dict[str, Style]) -> None:
    """Write each policy's name at the right end of its line, or near it if names would overlap."""
    low, high = axes.get_ylim()
    scale: Callable[[float], float] = math.log if axes.get_yscale() == "log" else float
    # The axes' approximate height in points; the exact layout is computed later.
    height = 72 * 2.2
    points = height / (scale(high) - scale(low))
    ends = []
    for name, found in series.items():
        if found and styles[name].named:
            _, end = found[-1]
            ends.append(
                (scale(min(max(end.mean, low), high)), end.mean, name, value_of(found[-1][0]))
            )
    ends.sort()
    wanted = [(at - scale(low)) * points for at, *_ in ends]
    for (_, mean, name, x), at, place in zip(ends, wanted, spread(wanted, height), strict=True):
        axes.annotate(
            plain(name),
            (x, min(max(mean, low), high)),
            xytext=(8, place - at),
            textcoords="offset points",
            va="center",
            color=styles[name].colour,
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], height: float) -> list[float]:
    """Return places at least LABEL_GAP apart, from 0 to `height`, as near to `wanted` as possible.

    `wanted` ascends; all are in points. Too many for the height continue above it.
    """
    gaps = LABEL_GAP * np.arange(len(wanted))
    # In places without their gaps, "at least a gap apart" means "not descending".
    apart = isotonic_regression(np.asarray(wanted, dtype=float) - gaps).x if wanted else gaps
    room = max(height - gaps[-1], 0.0) if wanted else 0.0
    return [float(place) for place in np.clip(apart, 0.0, room) + gaps]


def _size_axis(axes: Axes, sizes: Sequence[Size]) -> None:
    """Set ticks at the sizes, except ticks that would overlap."""
    values = [value_of(size) for size in sizes]
    wide = values[-1] > 10 * values[0] or sizes[0].slots is not None
    scale: Callable[[float], float] = math.log if wide else float
    if wide:
        axes.set_xscale("log")
    span = scale(values[-1]) - scale(values[0])
    ticks: list[float] = []
    for value in values:
        if not ticks or scale(value) - scale(ticks[-1]) > 0.055 * span:
            ticks.append(value)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    unit = "slots" if sizes[0].slots is not None else "ratio: slots as a share of the length"
    axes.set_xlabel(unit)


def _dots(axes: Axes, metric: Metric, series: _Series, styles: dict[str, Style]) -> None:
    for place, (name, points) in enumerate(series.items()):
        for _, value in points:
            style = styles[name]
            axes.plot([value.low, value.high], [place, place], color=style.colour, linewidth=2)
            marker = style.marker or "."
            axes.plot([value.mean], [place], color=style.colour, marker=marker, zorder=4)
    axes.set_yticks(range(len(series)), [plain(name) for name in series])
    axes.set_ylim(len(series) - 0.5, -0.5)
    if metric == "kl":
        log_axis(axes, "x", _extent(series))


def _extent(series: _Series) -> list[float]:
    """Means and upper ends; the lower end of a KL near zero would take most of a log axis."""
    return [x for points in series.values() for _, e in points for x in (e.mean, e.high)]


def value_of(size: Size) -> float:
    """The number of a size, whatever its unit."""
    value = size.ratio if size.ratio is not None else size.slots
    assert value is not None
    return value
