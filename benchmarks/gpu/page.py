"""Renders a run's document as Markdown and as a picture: ratios first, then absolute figures.

Parts that failed, were skipped or are not supported are listed with their reasons. Knows nothing of
how a figure was measured.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

VARIANTS = {
    "a2sf": "ours, a2sf .9",
    "table": "ours, a table",
    "window": "ours, window",
    "full": "ours, full cache",
    "dynamic": "transformers, dynamic cache",
    "batching": "transformers, continuous batching",
}

TITLES = {
    "machine": "Speeds of the machine",
    "checks": "Checks",
    "decode": "Decode steps, model of 8 billion weights",
    "decode-1b": "Decode steps, model of 1 billion weights",
    "concurrency": "Most concurrent sequences",
    "graphs": "CUDA graphs",
    "lengths": "Step time against length",
    "host": "What Python costs",
    "attention": "A prompt's attention in one layer",
    "prefill": "A whole prompt",
    "long-prompt": "End to end, measured",
    "long-answer": "End to end, extrapolated",
    "compiled": "Beside transformers' static cache, compiled",
    "kvpress": "Beside kvpress",
    "server": "The service",
    "walk": "Given texts through one layer",
    "tuner": "The tuner",
}

INTRODUCTION = """\
# On a GPU, side by side

Models are random, of real shapes, in bfloat16. Caches of decode cells are filled with random
numbers on all sides. A step ends with its tokens on the host; its time is the mean of a turn, and
the median over turns, with quartiles. Within a cell the variants take turns, so ratios hold where
absolute figures may not.

The roofline is what a step must move at least (weights once, keys and values in use once, in this
engine also 8 bytes a slot for position and score, 12 where it is scored; the scratch of logits, 4
bytes a slot and query head, is left out), over the bandwidth at which this device copied in the
same run. transformers' dynamic cache is decoded by a bare loop, without what `generate` adds around
it. Of its continuous batching each row has pages of its own."""


def markdown(document: dict[str, Any], source: str) -> str:
    """Return the whole page."""
    return "\n\n".join(_sections(document, source)) + "\n"


def _sections(document: dict[str, Any], source: str) -> Iterator[str]:
    yield INTRODUCTION
    yield f"{document['date']}; from `{source}`, which holds every figure; `{document['command']}`."
    yield "\n".join(f"- {name}: {value}" for name, value in document["machine"].items())
    if document["checks"] != "passed":
        yield f"**The checks are {document['checks']}: no timing here is valid.**"
    entries = document["entries"]
    for part in dict.fromkeys(entry["part"] for entry in entries):
        mine = [entry for entry in entries if entry["part"] == part]
        yield f"## {TITLES.get(part, part)}"
        if any("ms_per_step" in entry and "cell" in entry for entry in mine):
            yield from _cells(mine)
        else:
            yield from _figures(mine)
    missed = [one for one in (*document["parts"], *entries) if "reason" in one]
    if missed:
        yield "## Not measured"
        yield "\n".join(f"- {one['name']}: {one['status']}: {one['reason']}" for one in missed)


def _cells(entries: list[Entry]) -> Iterator[str]:
    """Yield the ratios of all cells, then the step times."""
    measured = [entry for entry in entries if "ms_per_step" in entry]
    yield "Times faster than transformers' dynamic cache; the price of scoring over a window:"
    rows = []
    for entry in measured:
        ratio = entry.get("times_faster_than_transformers", entry.get("times_faster"))
        cost = entry.get("price_of_scoring")
        priced = f"{cost['median']:+.1%} {_range(cost['quartiles'], '+.1%')}" if cost else ""
        share = entry.get("roofline_share")
        rows.append(
            [
                entry["cell"],
                _label(entry),
                "" if ratio is None else f"{ratio:.2f}",
                priced,
                "" if share is None else f"{share:.0%}",
            ]
        )
    yield table(["cell", "variant", "times faster", "price of scoring", "of the roofline"], rows)
    yield "Milliseconds a step, and what follows from them:"
    yield table(
        ["cell", "variant", "ms a step", "quartiles", "99th", "tokens/s", "KV GB"],
        [
            [
                entry["cell"],
                _label(entry),
                f"{entry['ms_per_step']:.3f}",
                _range(entry["ms_per_step_quartiles"], ".3f"),
                f"{entry['ms_single_step_p99']:.3f}",
                f"{entry['tokens_per_s']:.0f}",
                f"{entry['kv_bytes'] / 1e9:.2f}" if "kv_bytes" in entry else "",
            ]
            for entry in measured
        ],
    )


def _label(entry: Entry) -> str:
    return VARIANTS.get(entry["variant"]) or str(entry["name"]).rsplit(": ", 1)[-1]


def _figures(entries: list[Entry]) -> Iterator[str]:
    """Yield one line per entry with its named figures, ratios first."""
    lines = []
    for entry in entries:
        shown = {k: v for k, v in entry.items() if k not in ("part", "name", "status", "reason")}
        ratios = {k: v for k, v in shown.items() if k.startswith("times")}
        listed = ", ".join(
            f"{k.replace('_', ' ')} {_value(v)}" for k, v in (ratios | shown).items()
        )
        lines.append(f"- {entry['name']}: {listed or entry['status']}")
    yield "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:g} {_range(value['quartiles'], 'g')}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k.replace('_', ' ')} {_value(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list):
        return _range(value, "g")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _range(quartiles: list[float], form: str) -> str:
    return "[" + ", ".join(f"{one:{form}}" for one in quartiles) + "]"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def plot(document: dict[str, Any], out: Path) -> bool:
    """Draw tokens/s over the batch, one panel per context; False if there is nothing to draw."""
    cells = [e for e in document["entries"] if e["part"] == "decode" and "tokens_per_s" in e]
    contexts = sorted({entry["context"] for entry in cells})
    if not contexts:
        return False
    # Imported here, because a measuring machine may lack the packages for drawing.
    from tuner.report.svg import figure_style

    with figure_style("gpu"):
        drawn = _drawn(cells, contexts, document["machine"].get("device", ""))
    out.write_text(drawn, encoding="utf-8")
    return True


def _drawn(cells: list[Entry], contexts: list[int], device: str) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    from benchmarks.pictures import standalone
    from tuner.report.svg import GRID, to_svg

    figure = Figure(figsize=(4.6 * len(contexts), 4.2), layout="constrained")
    axes = figure.subplots(1, len(contexts), sharey=True, squeeze=False)
    batches = sorted({entry["batch"] for entry in cells})
    budgets = [entry["budget"] for entry in cells if entry["budget"] is not None]
    budget = max(set(budgets), key=budgets.count) if budgets else None
    for axis, context in zip(axes[0], contexts, strict=True):
        for number, (variant, label) in enumerate(VARIANTS.items()):
            points = sorted(
                (entry["batch"], entry["tokens_per_s"])
                for entry in cells
                if entry["context"] == context
                and entry["variant"] == variant
                and entry["budget"] in (budget, None)
            )
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    color=f"C{number}",
                    marker="os^DvP"[number],
                    linestyle="-" if variant in ("a2sf", "table", "window") else "--",
                    label=label,
                )
        axis.set(xscale="log", yscale="log", title=f"context {context:,}", xlabel="rows")
        axis.set_xticks(batches)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(which="both", color=GRID)
    axes[0][0].set_ylabel("tokens/s")
    found = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, frameon=False)
    heading = f"{device}: decoding at budget {budget}; dashed: all tokens kept"
    figure.suptitle(heading)
    return standalone(to_svg(figure, heading))
