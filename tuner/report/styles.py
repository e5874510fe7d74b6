"""Chooses the colour, the marker and the line of each policy in a picture.

Owns which policies have a name in a picture, and which stay in the background. Knows nothing of
axes or of figures.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from tuner.evaluation.results import Evaluation, Policy, Size
from tuner.report.svg import COLOURS

MORE_TABLES = ("#c2185b", "#5c6bc0", "#8d6e63")
"""Colours of the tables after the first."""


_OTHER = "#a5803a"


_BACKGROUND = "#9aa5b1"
"""Colour of uniform settings that are not the best at any size."""


_MARKERS = "os^DvPX<>phd8H"


_LINES = ("-", "--", "-.", ":")


def kind_of(policy: Policy) -> str:
    """The kind of a policy: `table`, or the name before the first colon."""
    return "table" if policy.alpha is not None else policy.name.split(":")[0]


@dataclass(frozen=True)
class Style:
    """How a policy is drawn."""

    colour: str
    marker: str
    line: str
    width: float
    order: int
    named: bool = True


def styles_of(evaluation: Evaluation, task: str, sizes: Sequence[Size]) -> dict[str, Style]:
    """Choose a style per policy.

    Tables have thick lines, the best uniform settings colours, and other uniform settings are grey.
    """
    shown = [policy for policy in evaluation.policies if kind_of(policy) != "full"]
    kinds: dict[str, list[str]] = defaultdict(list)
    best = {cell.policy for s in sizes if (cell := evaluation.best_a2sf(task, s))}
    for policy in sorted(shown, key=_alpha):
        if kind_of(policy) != "a2sf" or policy.name in best:
            kinds[kind_of(policy)].append(policy.name)
    found = {}
    for place, policy in enumerate(shown):
        kind = kind_of(policy)
        if policy.name not in kinds[kind]:
            found[policy.name] = Style(_BACKGROUND, "", "-", 0.8, 2, named=False)
            continue
        rank = kinds[kind].index(policy.name)
        found[policy.name] = Style(
            _colour(kind, rank),
            "*" if kind == "table" and rank == 0 else _MARKERS[place % len(_MARKERS)],
            _LINES[rank % len(_LINES)],
            2.6 if kind == "table" else 1.6,
            4 if kind == "table" else 3,
        )
    return found


def _colour(kind: str, rank: int) -> str:
    # Each table has a colour; policies of another kind share one and differ by their lines.
    if kind == "table" and rank:
        return MORE_TABLES[(rank - 1) % len(MORE_TABLES)]
    return COLOURS.get(kind, _OTHER)


def _alpha(policy: Policy) -> float:
    with suppress(ValueError, IndexError):
        return float(policy.name.split(":")[1])
    return 0.0
