"""Draws the pictures of a fit: the costs of its table and of baselines, and each stage's value.

Owns their axes and marks; paper, colours and the conversion to SVG are in `pictures`. Knows
nothing of heat maps, or of the page around a picture.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from a2sf.schema import Estimate, Evidence, Stage
from tuner.report.svg import COLOURS, GRID, INK, figure_style, log_axis, plain, to_svg
from tuner.settings import PER_LAYER

WIDTH = 5.6
DECADE = 10.0
"""A larger ratio between costs is shown on a log axis."""


def costs(evidence: Evidence, *, label: str, salt: str) -> str:
    """Draw the held-out cost of the table and each baseline: a dot with its interval each."""
    rows = [("fitted table", "table", evidence.table)]
    rows += [(name, name, value) for name, value in evidence.baselines.items()]
    with figure_style(salt):
        figure = Figure(figsize=(WIDTH, 0.8 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (_, kind, value) in enumerate(rows):
            colour = COLOURS.get(kind, INK)
            axes.plot([value.low, value.high], [place, place], color=colour, linewidth=2.4)
            marker = "D" if kind == "table" else "o"
            axes.plot([value.mean], [place], color=colour, marker=marker, zorder=4)
        _best_uniform_line(axes.axvline, evidence)
        axes.set_yticks(range(len(rows)), [plain(name) for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        _cost_axis(axes, "x", [value for _, _, value in rows])
        return to_svg(figure, label)


def stages(found: Sequence[Stage], evidence: Evidence, *, label: str, salt: str) -> str:
    """Draw cost over evaluations: calibration as steps, held-out costs as points at stages' ends.

    The number of each stage, from 1, is drawn above its end. The search for the baseline
    `per layer` has only its number, because its result is not a setting of the table.
    """
    all_ends = list(accumulate(stage.evaluations for stage in found))
    own = [(end, one) for end, one in zip(all_ends, found, strict=True) if one.name != PER_LAYER]
    ends = [end for end, _ in own]
    held_out = [stage.held_out for _, stage in own]
    with figure_style(salt):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        axes = figure.subplots()
        axes.step(
            ends,
            [stage.calibration for _, stage in own],
            where="post",
            color=INK,
            marker=".",
            linewidth=1.4,
            label="calibration, best so far",
        )
        for end, value in zip(ends, held_out, strict=True):
            axes.plot([end, end], [value.low, value.high], color=COLOURS["table"], linewidth=2.4)
        axes.plot(
            ends,
            [value.mean for value in held_out],
            color=COLOURS["table"],
            marker="D",
            linestyle="",
            zorder=4,
            label="held out",
        )
        _best_uniform_line(axes.axhline, evidence)
        calibration = [
            Estimate(mean=s.calibration, low=s.calibration, high=s.calibration) for _, s in own
        ]
        _cost_axis(axes, "y", [*held_out, *calibration, evidence.baselines["uniform"]])
        right = 1.04 * all_ends[-1] or 1.0
        axes.set_xlim(0, right)
        axes.xaxis.set_major_locator(MaxNLocator(8))
        axes.set_xlabel("evaluations: passes over all calibration examples")
        _number_stages(axes, all_ends, right)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, columnspacing=1)
        return to_svg(figure, label)


def _number_stages(axes: Axes, ends: Sequence[float], right: float) -> None:
    """Draw numbers above the ends; move overlapping numbers apart."""
    place = -right
    for number, end in enumerate(ends, 1):
        axes.axvline(end, color=GRID, linewidth=0.8, zorder=1)
        place = max(end, place + 0.025 * right)
        axes.annotate(
            str(number),
            (place, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            annotation_clip=False,
        )


def _best_uniform_line(line: Callable[..., object], evidence: Evidence) -> None:
    line(
        evidence.baselines["uniform"].mean,
        color=COLOURS["uniform"],
        linestyle="--",
        linewidth=1.2,
        label="best uniform, held out",
    )


def _cost_axis(axes: Axes, which: Literal["x", "y"], values: Sequence[Estimate]) -> None:
    ends = [end for value in values for end in (value.low, value.high)]
    if 0 < DECADE * min(ends) < max(ends):
        log_axis(axes, which, ends)
    axes.set(**{f"{which}label": "cost, lower is better"})
    axes.grid(axis=which, color=GRID, linewidth=0.6)
