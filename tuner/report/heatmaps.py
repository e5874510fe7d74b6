"""Heat maps: KL by policy and size, and a model's heads by layer.

Owns colour scales, their bars, and the text in cells. Knows nothing of curves or of how figures are
measured. Colours of paper and text, and the conversion to SVG, are in `tuner.report.pictures`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from tuner.evaluation.results import Cell, Evaluation, Size
from tuner.report.pictures import value_of
from tuner.report.sentences import half_life
from tuner.report.styles import kind_of
from tuner.report.svg import PANEL_WIDTH, PAPER, WIDTH, figure_style, log_range, plain, to_svg
from tuner.search.space import LOG_TAU_MAX, log_tau_of

DARK_TEXT, LIGHT_TEXT = "#111111", "#fafafa"
"""For cells, whose colours are the same in the light and the dark form."""

MAX_PRINTED = 64
"""Largest number of cells with printed values; more would not be legible."""


def kl_map(
    evaluation: Evaluation, task: str, sizes: Sequence[Size], *, label: str, salt: str
) -> str:
    """Draw KL by policy and size, printed in every cell, coloured on a log scale."""
    names = [
        policy.name
        for policy in evaluation.policies
        if kind_of(policy) != "full" and any(evaluation.cell(task, policy.name, s) for s in sizes)
    ]
    cells = [[evaluation.cell(task, name, size) for size in sizes] for name in names]
    values = np.array([[cell.kl.mean if cell else np.nan for cell in row] for row in cells])
    norm = LogNorm(*log_range(values.flat), clip=True)
    with figure_style(salt):
        longest = max(map(len, map(plain, names)))
        width = min(WIDTH, 1.6 + 0.085 * longest + 0.62 * len(sizes))
        figure = Figure(figsize=(width, 0.9 + 0.27 * len(names)), layout="constrained")
        axes = figure.subplots()
        _heat(axes, values, norm, _map("cividis_r"), lambda v: "" if np.isnan(v) else f"{v:.3g}")
        axes.set_xticks(np.arange(len(sizes)) + 0.5, [f"{value_of(size):g}" for size in sizes])
        if len({size.slots is None for size in sizes}) > 1:
            axes.set_xticklabels([str(size) for size in sizes])
        axes.set_yticks(np.arange(len(names)) + 0.5, [plain(name) for name in names])
        axes.set_xlabel("slots" if sizes[0].ratio is None else "ratio")
        _colour_bar(figure, list(figure.axes), norm, _map("cividis_r"), "KL, nats")
        return to_svg(figure, label)


def head_maps(cells: Sequence[Cell], *, labels: Sequence[str], salt: str) -> list[str]:
    """Draw attention similarity by layer and KV head, one map per cell, on one colour scale."""
    grids = [np.array(cell.similarity_by_head) for cell in cells]
    layers, heads = grids[0].shape
    low, high = min(g.min() for g in grids), max(g.max() for g in grids)
    norm = Normalize(low, max(high, low + 1e-6))
    printed = (lambda v: f"{v:.3f}".lstrip("0")) if layers * heads <= MAX_PRINTED else None
    # No map is wider than a narrow window, because maps may stand below each other.
    width = min(PANEL_WIDTH, 1.4 + max(2.1, 0.42 * heads)) if printed else 3.6
    height = 0.8 + min(max(0.24 * layers, 1.2), 6)
    drawn = []
    for place, (cell, values) in enumerate(zip(cells, grids, strict=True)):
        with figure_style(f"{salt}-{place}"):
            figure = Figure(figsize=(width, height), layout="constrained")
            axes = figure.subplots()
            _heat(axes, values, norm, _map("viridis"), printed)
            axes.set_title(plain(cell.policy))
            _head_axes(axes, layers, heads)
            _colour_bar(figure, [axes], norm, _map("viridis"), "similarity")
            drawn.append(to_svg(figure, labels[place]))
    return drawn


def alpha_map(alpha: Sequence[Sequence[float]], *, label: str, salt: str) -> str:
    """Draw alphas by layer and KV head on the scale of log tau, with half-lives in tokens below."""
    values = np.array(alpha)
    layers, heads = values.shape
    printed = layers * heads <= MAX_PRINTED
    with figure_style(salt):
        figure, axes = _map_of_heads(layers, heads, 0.62 if printed else 0.4, printed)
        norm = Normalize(0, LOG_TAU_MAX)
        scaled = np.array([[log_tau_of(value) for value in row] for row in alpha])
        _heat(axes, scaled, norm, _map("cividis"), None)
        if printed:
            for (layer, head), value in np.ndenumerate(values):
                text = f"{value:.4g}\n{half_life(float(value))}"
                _print(axes, layer, head, text, _map("cividis")(norm(scaled[layer, head])))
        _head_axes(axes, layers, heads)
        axes.set_title("alpha and half-life")
        bar = _colour_bar(figure, [axes], norm, _map("cividis"), "half-life, tokens")
        marks = (0, 0.5, 0.9, 0.99, 1)
        bar.set_ticks([log_tau_of(mark) for mark in marks], labels=[half_life(m) for m in marks])
        return to_svg(figure, label)


def slot_map(slots: Sequence[Sequence[float]], *, label: str, salt: str) -> str:
    """Draw slots by layer and KV head in multiples of the budget, on a log scale around 1."""
    values = np.array(slots)
    layers, heads = values.shape
    printed = layers * heads <= MAX_PRINTED
    furthest = max(2.0, float(np.exp(np.abs(np.log(values)).max())))
    norm = LogNorm(1 / furthest, furthest)
    with figure_style(salt):
        figure, axes = _map_of_heads(layers, heads, 0.62 if printed else 0.4, printed)
        _heat(axes, values, norm, _map("BrBG"), (lambda v: f"{v:.2f}x") if printed else None)
        _head_axes(axes, layers, heads)
        axes.set_title("slots")
        _colour_bar(figure, [axes], norm, _map("BrBG"), "multiples of the budget")
        return to_svg(figure, label)


def _map_of_heads(layers: int, heads: int, cell: float, printed: bool) -> tuple[Figure, Axes]:
    """Make a figure with legible cells, at most as wide as one of two panels side by side."""
    width = min(PANEL_WIDTH, 1.8 + max(cell * heads, 2))
    height = 0.8 + max((0.4 if printed else 0.16) * layers, 1.4)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _heat(
    axes: Axes,
    values: np.ndarray,
    norm: Normalize,
    colours: Colormap,
    text: Callable[[float], str] | None,
) -> None:
    shown = np.ma.masked_invalid(values)
    # A mesh stays vector graphics; an image would be a bitmap in the page.
    axes.pcolormesh(shown, norm=norm, cmap=colours, edgecolors=PAPER, linewidth=0.6)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if text is not None:
        for (row, column), value in np.ndenumerate(values):
            _print(axes, row, column, text(value), colours(norm(value)))


def _print(axes: Axes, row: int, column: int, text: str, behind: Any) -> None:
    red, green, blue, _ = behind
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5
    axes.text(
        column + 0.5,
        row + 0.5,
        text,
        ha="center",
        va="center",
        fontsize=8,
        color=DARK_TEXT if light else LIGHT_TEXT,
    )


def _head_axes(axes: Axes, layers: int, heads: int) -> None:
    for count, place in ((heads, axes.set_xticks), (layers, axes.set_yticks)):
        numbers = np.arange(0, count, -(-count // 16))
        place(numbers + 0.5, [str(number) for number in numbers])
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")


def _map(name: str) -> Colormap:
    return matplotlib.colormaps[name].resampled(64)


def _colour_bar(
    figure: Figure, beside: Sequence[Axes], norm: Normalize, colours: Colormap, label: str
) -> Any:
    source = matplotlib.cm.ScalarMappable(norm, colours)
    bar = figure.colorbar(source, ax=beside, label=label, fraction=0.08, aspect=18, pad=0.02)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    # By default the bar would be a bitmap.
    bar.solids.set(rasterized=False, edgecolor="face")
    bar.minorticks_off()
    if isinstance(norm, LogNorm):
        bar.locator = LogLocator(subs=(1, 2, 5))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return bar
