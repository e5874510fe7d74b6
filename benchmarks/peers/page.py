"""Renders the grid's figures as Markdown tables and as a picture.

Owns the layout of results; knows nothing of how they were measured.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from benchmarks.pictures import standalone
from tuner.report.svg import GRID, figure_style, to_svg

from .variants import BASE, VARIANTS

Entry = dict[str, Any]
Cell = dict[str, Any]
Show = Callable[[Entry], str]

INTRODUCTION = """\
# Decoding on a processor, side by side

Made by `make bench` from `{source}`, which holds quartiles and memory too. A step's time is
the mean of a turn of {steps} steps after {untimed} untimed, and the median of {rounds} turns;
within a cell the variants take turns, so ratios hold where absolute figures do not. Caches are
filled beforehand; every row has the same prompt, and no token ends a completion. What evicts keeps
the budget; all else keeps every token, and stands beside each budget.

The predicted time is what a step must move (weights once, the KV of each row in one pass; in three
where the cache is copied to be extended or gathered) over the bandwidth at which this machine was
seen to read. It is a floor for what lives in memory; what fits the processor's cache can be faster.
"""

NOTES = """\
What to know of the peers: OpenVINO evicts whole blocks of 32 tokens and kvpress once in a turn, so
both hold more than the budget (see the tokens a row holds). Rows of transformers continuous
batching share the pages of their prompt, which favours it; on a processor it has no paged kernel.
Rows of all other peers hold copies of their own. torch's threads sleep while they wait in this
engine, as in its server, and spin in the other peers. In a decode step, this engine multiplies by
its own kernels for few rows, OpenVINO by oneDNN, and the other peers by torch's float32 kernels,
which are slow on this processor: the line of this engine with all tokens kept shows what that alone
gives, and the other lines what eviction adds.

Where OpenVINO is faster than this engine, and how: OpenVINO compiles the whole step into one graph,
with norms, rotation and activation fused. Here these are separate operations of torch, called from
Python, some microseconds each: about .4 ms a layer. So its lead is largest where a step is short:
small models and few rows."""


def markdown(document: dict[str, Any], source: str) -> str:
    """Return the whole page."""
    return "\n\n".join(_sections(document, source)) + "\n"


def _sections(document: dict[str, Any], source: str) -> Iterator[str]:
    settings = document["settings"]
    yield INTRODUCTION.format(source=source, **settings).rstrip()
    machine = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    yield f"{document['date']}; {machine}; {settings['threads']} threads."
    for environment, versions in document["versions"].items():
        listed = ", ".join(f"{name} {value}" for name, value in versions.items())
        yield f"- {environment}: {listed}"
    yield NOTES
    for left_out in document.get("left_out", []):
        yield f"Left out: {left_out}."
    reasons: list[str] = []
    for (model, dtype), cells in groups(document).items():
        yield f"## {model}, {dtype}"
        for budget in budgets(cells):
            yield f"### Budget {budget}"
            for title, show in TABLES.items():
                yield f"{title}, by context x batch:"
                yield _table(cells, budget, show, reasons)
        yield "Seconds to prefill one prompt:"
        yield _table(cells, budgets(cells)[-1], lambda e: f"{e['prefill_s']:.2f}", reasons)
    if reasons:
        yield "## Not measured"
        yield "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))


def _measured_and_predicted(entry: Entry) -> str:
    return f"{entry['ms_per_step']:.1f} / {entry['predicted_ms']:.1f}"


def _ratio(entry: Entry) -> str:
    ratio = entry.get("times_faster_than_transformers")
    return "-" if ratio is None else f"{ratio:.2f}"


TABLES: dict[str, Show] = {
    f"Times faster than {VARIANTS[BASE].label}": _ratio,
    "Tokens/s": lambda e: f"{e['tokens_per_s']:.1f}",
    "Measured / predicted ms a step": _measured_and_predicted,
    "Tokens a row holds": lambda e: f"{e['kv_tokens']:.0f}",
}


def groups(document: dict[str, Any]) -> dict[tuple[str, str], list[Cell]]:
    """Group cells by model and dtype, in order of context and batch."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in sorted(document["cells"], key=lambda c: (c["context"], c["batch"])):
        found.setdefault((cell["model"], cell["dtype"]), []).append(cell)
    return found


def budgets(cells: list[Cell]) -> list[int | None]:
    """The budgets in these cells; a single None if no entry has one."""
    found = {e["budget"] for cell in cells for e in cell["entries"]} - {None}
    return sorted(found) or [None]


def entry_of(cell: Cell, variant: str, budget: int | None) -> Entry | None:
    """Return a variant's entry at a budget; an entry without a budget is valid for every budget."""
    return next(
        (e for e in cell["entries"] if e["variant"] == variant and e["budget"] in (budget, None)),
        None,
    )


def _table(cells: list[Cell], budget: int | None, show: Show, reasons: list[str]) -> str:
    head = [f"{cell['context']} x {cell['batch']}" for cell in cells]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(cells)]
    for variant in VARIANTS.values():
        entries = [entry_of(cell, variant.name, budget) for cell in cells]
        if any(entries):
            shown = [_shown(entry, show, variant.label, reasons) for entry in entries]
            lines.append(f"| {variant.label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _shown(entry: Entry | None, show: Show, label: str, reasons: list[str]) -> str:
    if entry is None:
        return ""
    if "ms_per_step" in entry:
        return show(entry)
    reason = f"{label}: {entry['reason']}"
    if reason not in reasons:
        reasons.append(reason)
    return f"{entry['status']} ({reasons.index(reason) + 1})"


def plot(document: dict[str, Any], out: Path, *, budget: int) -> None:
    """Draw tokens/s over the context: one row per model and dtype, one column per batch.

    The columns are the smallest and the largest batch that all rows have. Each variant is a line.
    """
    rows = {
        key: cells
        for key, cells in groups(document).items()
        # A single context makes no line.
        if len({cell["context"] for cell in cells}) > 1
    }
    common = [{cell["batch"] for cell in cells} for cells in rows.values()]
    measured = set.intersection(*common) if common else set()
    if not measured:
        return
    batches = tuple(sorted({min(measured), max(measured)}))
    with figure_style("grid"):
        out.write_text(_drawn(rows, budget, batches), encoding="utf-8")


def _drawn(rows: dict[tuple[str, str], list[Cell]], budget: int, batches: tuple[int, ...]) -> str:
    width, height = 5.2 * len(batches), 3.6 * len(rows) + 0.9
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(rows), len(batches), squeeze=False)
    for line, ((model, dtype), cells) in zip(axes, rows.items(), strict=True):
        contexts = sorted({cell["context"] for cell in cells})
        for axis, batch in zip(line, batches, strict=True):
            for number, variant in enumerate(VARIANTS.values()):
                points = [
                    (cell["context"], entry["tokens_per_s"])
                    for cell in cells
                    if cell["batch"] == batch
                    and (entry := entry_of(cell, variant.name, budget)) is not None
                    and "tokens_per_s" in entry
                ]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        color=f"C{number}",
                        marker="os^Dv"[number % 5],
                        markersize=4,
                        linestyle="-" if variant.bounded else "--",
                        linewidth=2.4 if variant.name == "a2sf" else 1.3,
                        label=variant.label,
                    )
            axis.set(xscale="log", yscale="log", title=f"{model}, {dtype}, batch {batch}")
            axis.set(xlabel="context, tokens", ylabel="tokens/s")
            axis.set_xticks(contexts)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
                scale.set_minor_locator(NullLocator())
            axis.grid(which="both", color=GRID)
    found = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, frameon=False)
    heading = f"Decoding at budget {budget}, tokens a second; dashed: all tokens kept"
    figure.suptitle(heading)
    return standalone(to_svg(figure, heading))
