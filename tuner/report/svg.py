"""The look that all pictures share, and their conversion from matplotlib's figures to SVG.

Owns the colours, the sizes, the log axis, and the clean-up of matplotlib's SVG: no ids that could
collide, and no external resources. Figures are drawn through matplotlib's objects, without pyplot,
in colours for white paper; the page's style sheet maps them to a dark form. Knows nothing of what a
picture shows.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import StringIO
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

KL_FLOOR = 1e-6
"""Smaller values are rounding errors, and would take most of a log axis."""


PX_PER_INCH = 100


MIN_SCALE = 0.6
"""Smallest scale of a picture in a narrow window; below it, the figure scrolls."""


WIDTH = 11.0
"""Width of a page, in inches."""


PANEL_WIDTH = WIDTH / 2
"""Width of one metric's panel, in inches; two fit side by side."""


INK, GRID, PAPER = "#222222", "#dddddd", "#ffffff"
"""The page's style sheet replaces these three colours by their dark forms, so draw nothing else in
them."""


# The palette of Okabe and Ito, distinguishable with any common colour blindness, in shades that are
# visible on white and on black.
COLOURS = {
    "table": "#009e73",
    "uniform": "#2b8cc4",
    "a2sf": "#2b8cc4",
    "h2o": "#d55e00",
    "window": "#e69f00",
    "tova_per_head": "#cc79a7",
    "random": "#808080",
    "pyramid": "#8a63c9",
    "pyramid a2sf": "#8a63c9",
    "adakv": "#7a8b2e",
    "adakv a2sf": "#7a8b2e",
}


def log_axis(axes: Axes, which: str, values: Iterable[float]) -> None:
    """Set a log axis over values above the floor; a mean of zero is outside the picture."""
    low, high = log_range(values)
    low, high = low / 1.5, high * 1.2
    # Set limits first: a log axis finds none if every figure is zero.
    axes.set(**{f"{which}lim": (low, high)})
    axes.set(**{f"{which}scale": "log"})
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def log_range(values: Iterable[float]) -> tuple[float, float]:
    """Return the range of a log scale: the values above the floor, never empty."""
    above = [value for value in values if value > KL_FLOOR] or [KL_FLOOR]
    return min(above), max(*above, min(above) * 1.01)


@contextmanager
def figure_style(salt: str) -> Iterator[None]:
    """Apply the same look under any user's settings, with text not parsed as markup."""
    with warnings.catch_warnings(), matplotlib.rc_context():
        # The page's reader has fonts that are missing here for the measurement of texts.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": salt,
                "text.parse_math": False,
                "font.size": 9,
                "axes.titlesize": 9.5,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                **dict.fromkeys(
                    (
                        "text.color",
                        "axes.labelcolor",
                        "axes.edgecolor",
                        "xtick.color",
                        "ytick.color",
                    ),
                    INK,
                ),
            }
        )
        yield


def plain(name: str) -> str:
    """Make a name printable as a label: without control characters, cut if too long."""
    name = "".join(letter for letter in name if letter.isprintable())
    return name if len(name) <= 32 else f"{name[:31]}…"


def to_svg(figure: Figure, label: str) -> str:
    """Save as an SVG element for HTML: without namespaces and without unused ids."""
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', file.getvalue()))
    for parent in list(root.iter()):
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
        for key in list(parent.attrib):
            value = parent.attrib.pop(key)
            if key != "id" or value in used:
                parent.set(key.rpartition("}")[2], value)
    width = figure.get_figwidth() * PX_PER_INCH
    style = f"width: {width:.0f}px"
    if figure.get_figwidth() > PANEL_WIDTH:
        style += f"; min-width: {MIN_SCALE * width:.0f}px"
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"role": "img", "aria-label": label, "viewBox": box, "style": style})
    return ElementTree.tostring(root, encoding="unicode")
