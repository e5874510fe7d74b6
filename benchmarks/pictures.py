"""Writes pictures as files: SVG with a title and paper that follows the viewer's colour scheme.

Owns the conversion of a page's picture to a file, and the drawing of a stored study. Knows nothing
of how figures are measured.
"""

from typing import Any
from xml.sax.saxutils import escape, unescape

from a2sf.policy import PRESETS
from a2sf.schema import Estimate
from tuner.evaluation.results import METRICS, Cell, Evaluation, Policy, Size
from tuner.report.pictures import curves, metrics_of
from tuner.report.svg import GRID, INK, PAPER

DARK = {INK: "#e6e9ed", GRID: "#3a4149", PAPER: "#15181c"}
"""The dark forms of the three colours of light paper, as in the pages."""


def standalone(picture: str) -> str:
    """Make a file from an SVG element of a page: namespace, title, paper and dark form.

    The title is the element's label.
    """
    element, rest = picture.split(">", 1)
    label = unescape(element.split('aria-label="')[1].split('"')[0], {"&quot;": '"'})
    rules = "".join(
        f'[style*="{part}: {light}"] {{ {part}: {dark} !important; }} '
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    style = (
        f".paper {{ fill: {PAPER}; }} @media (prefers-color-scheme: dark) "
        f"{{ .paper {{ fill: {DARK[PAPER]}; }} {rules}}}"
    )
    return (
        f'{element} xmlns="http://www.w3.org/2000/svg">\n<title>{escape(label)}</title>\n'
        f'<style>{style}</style>\n<rect class="paper" width="100%" height="100%"/>{rest}\n'
    )


def study_picture(study: dict[str, Any]) -> str:
    """Draw a study stored in `results/findings.json`: each metric over the ratios, as a file."""
    task = study["tasks"][0]["name"]
    names = dict.fromkeys(cell["policy"] for cell in study["cells"])

    def drawn(cell: dict[str, Any]) -> Cell:
        size = None if cell["ratio"] is None else Size(ratio=cell["ratio"])
        values: dict[str, Any] = {metric: _estimate(cell[metric]) for metric in METRICS}
        return Cell.model_construct(task=cell["task"], policy=cell["policy"], size=size, **values)

    # Only the stored figures are drawn; the other fields of an evaluation are omitted.
    found = Evaluation.model_construct(
        policies=tuple(
            Policy(name=name, description="", alpha=((0.0,),) if _is_table(name) else None)
            for name in names
        ),
        cells=tuple(map(drawn, study["cells"])),
    )
    ratios = sorted({cell["ratio"] for cell in study["cells"]} - {None})
    picture = curves(
        found,
        task,
        [Size(ratio=ratio) for ratio in ratios],
        metrics_of(found, task),
        label=f"{task}: {study['question']}",
        salt=study["name"],
        heading=True,
    )
    return standalone(picture)


def _is_table(name: str) -> bool:
    return name.split(":")[0] not in (*PRESETS, "a2sf")


def _estimate(value: list[float] | None) -> Estimate | None:
    return None if value is None else Estimate(mean=value[0], low=value[1], high=value[2])
