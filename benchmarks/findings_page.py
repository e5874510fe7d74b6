"""Renders the findings' figures as Markdown tables between a page's markers.

Owns the layout of a study; the text around the markers is written by hand. Knows nothing of how a
figure was measured.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from tuner.evaluation.results import METRICS, Metric


def render(study: dict[str, Any]) -> Iterable[str]:
    """Yield the study's paragraphs and tables in Markdown."""
    yield f"`{study['command']}`"
    if len({cell["ratio"] for cell in study["cells"]} - {None}) > 1:
        for metric in ("kl", "accuracy"):
            yield _by_ratio(study, metric)
    elif {cell["policy"] for cell in study["cells"]} == {"full"}:
        yield _card(study)
    else:
        for task in study["tasks"]:
            yield _by_policy(study, task)


def _card(study: dict[str, Any]) -> str:
    lines = ["| task | questions | right | NLL of the answers |", "|---|---|---|---|"]
    for task, cell in zip(study["tasks"], study["cells"], strict=True):
        lines.append(
            f"| {task['name']} | {task['questions']} | {_shown(cell['accuracy'], 'accuracy')} "
            f"| {_shown(cell['nll'], 'nll')} |"
        )
    return "\n".join(lines)


def _by_ratio(study: dict[str, Any], metric: Metric) -> str:
    ratios = sorted({cell["ratio"] for cell in study["cells"]} - {None})
    lines = [
        f"{METRICS[metric]}:",
        "",
        "| policy | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
        "|---|" + "---|" * len(ratios),
    ]
    for policy in dict.fromkeys(cell["policy"] for cell in study["cells"]):
        mine = {c["ratio"]: c[metric] for c in study["cells"] if c["policy"] == policy}
        shown = (_shown(mine.get(ratio, mine.get(None)), metric) for ratio in ratios)
        lines.append(f"| {policy} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _by_policy(study: dict[str, Any], task: dict[str, Any]) -> str:
    cells = [cell for cell in study["cells"] if cell["task"] == task["name"]]
    cells.sort(key=lambda cell: cell["kl"][0])
    names: list[Metric] = ["kl", "top1", "accuracy", "similarity"]
    if task["accuracy"] is None:
        names.remove("accuracy")
    lines = [
        f"**{task['name']}** ({task['examples']} examples, {task['counted']} positions"
        + (f", {task['questions']} questions" if task["questions"] else "")
        + (f", blocks of {task['prefill_chunk']}" if task["prefill_chunk"] else "")
        + ")",
        "",
        "| policy | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for cell in cells:
        shown = (_shown(cell[name], name) for name in names)
        lines.append(f"| {cell['policy']} | " + " | ".join(shown) + " |")
    pairs = [c for c in study["comparisons"] if c["task"] == task["name"]]
    if pairs:
        lines += ["", "| KL difference | mean | p, corrected |", "|---|---|---|"]
        lines += [
            f"| {c['policy']} - {c['baseline']} | {_shown(c['kl'], 'kl', sign=True)} "
            f"| {c['p_holm']:.2g} |"
            for c in pairs
        ]
    return "\n".join(lines)


def _shown(value: Sequence[float] | None, metric: Metric, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    if metric == "accuracy":
        return f"{value[0]:.1%} [{value[1]:.1%}, {value[2]:.1%}]"
    form = "+.3f" if sign else ".3f"
    # Rounded before formatting, and + 0.0, to avoid a negative zero.
    mean, low, high = (round(x, 3) + 0.0 for x in value)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def fill(page: str, name: str, block: str) -> str:
    """Put the block between the markers with its name, if the page has them."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    return f"{before}{begin}\n{block}\n{end}{after}" if found else page
