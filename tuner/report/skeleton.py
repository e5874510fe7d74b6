"""Shared parts of the HTML pages: the layout, the format of figures, pictures with captions.

Owns the rendering of values to a page without scripts or external resources. Knows nothing of the
contents of a page: `evaluation_page` shows an evaluation, `table_page` a fitted table.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from a2sf.schema import Estimate
from tuner.evaluation.results import SIGNIFICANT, Comparison
from tuner.progress import duration
from tuner.report.pictures import LOWER_IS_BETTER

ROUNDING = 5e-7
"""Smaller magnitudes are rounding errors, and are shown as zero."""


@dataclass(frozen=True)
class Picture:
    """An SVG element and its caption; panels share the caption of their group."""

    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Panels:
    """Pictures side by side if there is room, with one caption."""

    pictures: tuple[Picture, ...]
    caption: str


def render(template: str, **values: Any) -> str:
    """Fill in a template beside this module; the same values always give the same text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Names and ids come from outside. Jinja does not infer HTML from the suffix .j2.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=figure, number=number, p=p_value, verdict=_verdict, duration=duration
    )
    return environment.get_template(template).render(**values)


def number(value: float, decimals: int = 4, *, sign: bool = False) -> str:
    """Format with fixed decimals, or with two digits and an exponent if those would be zeros."""
    value = 0.0 if abs(value) < ROUNDING else value
    form = ".1e" if 0 < abs(value) < 0.001 else f".{decimals}f"
    return f"{value:{'+' if sign else ''}{form}}"


def figure(estimate: Estimate, decimals: int = 4, *, sign: bool = False) -> str:
    """Format a mean and its interval."""
    mean, low, high = (
        number(value, decimals, sign=sign) for value in (estimate.mean, estimate.low, estimate.high)
    )
    return f"{mean} [{low}, {high}]"


def p_value(value: float) -> str:
    """Format a p-value to four decimals."""
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def _verdict(comparison: Comparison) -> str:
    """The result of a comparison in words, after the correction: direction, and better or worse."""
    if comparison.p_holm >= SIGNIFICANT:
        return "not significant"
    lower = comparison.difference.mean < 0
    better = lower == (comparison.metric in LOWER_IS_BETTER)
    return f"{'better' if better else 'worse'} ({'lower' if lower else 'higher'})"
