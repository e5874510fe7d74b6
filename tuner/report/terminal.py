"""Prints a table for people: the figures with their intervals, the verdict, the heat map.

Owns the wording and the colours. All figures come from the table, so a file shown later gives the
same figures as the fit, except the likelihoods, which only the fit knows.
"""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from a2sf.schema import AlphaTable, TablePolicy
from tuner.evaluation.results import SIGNIFICANT, Comparison, Evaluation, Metric
from tuner.progress import duration
from tuner.report.sentences import (
    advice_line,
    calibration_line,
    caution_line,
    columns,
    figure,
    half_life,
    policy_line,
    slots,
    verdict_line,
)
from tuner.search.space import LOG_TAU_MAX, log_tau_of

if TYPE_CHECKING:
    from tuner.fit import Outcome


HEADINGS: dict[Metric, str] = {
    "kl": "KL to full, nats",
    "nll": "NLL, nats a token",
    "top1": "top-1 agreement",
    "accuracy": "accuracy",
    "similarity": "attention kept",
}


def print_outcome(
    console: Console, outcome: "Outcome", *, model: str, out: Path, study_kept: str
) -> None:
    """Print the outcome of a fit.

    `model` is the user's name for it, which a table does not contain.
    """
    table = outcome.table
    _line(console, f"{policy_line(table.policy)}; fitted on {calibration_line(table)}")
    _figures(console, table)
    _stages(console, table)
    nll = [("full cache", outcome.full_nll), *((k, outcome.nll[k]) for k in ("table", "uniform"))]
    _line(
        console,
        "NLL, nats a token: " + ", ".join(f"{name} {figure(value)}" for name, value in nll),
    )
    _line(console, "")
    _verdict(console, table, outcome.remedy)
    for note in outcome.notes:
        _line(console, note)
    _line(console, f"Study {study_kept}: {_continuation(outcome.limits)}.")
    for line in _serve_lines(out, table.name, model):
        _line(console, line)


def _continuation(limits: Sequence[str]) -> str:
    if not limits:
        return "no limit ended the search; the same command gives the same table"
    return f"run the same command again with more {' and '.join(limits)} to continue"


def _serve_lines(out: Path, name: str, model: str) -> Iterator[str]:
    """Say how to serve the table. A server reads the files of a directory that end in .json."""
    serve = ["--model", model, "--tables", str(out.parent), "--default-table", name]
    command = f"python -m service {shlex.join(serve)}"
    if out.suffix == ".json":
        yield f"Wrote {out}. Serve it: {command}"
        return
    renamed = out.with_name(f"{out.name}.json")
    yield f"Wrote {out}. A server reads only files that end in .json. Rename and serve it:"
    yield f"{shlex.join(['mv', str(out), str(renamed)])} && {command}"


def show(console: Console, table: AlphaTable) -> None:
    """Print all contents of a table's file."""
    model = table.model
    _line(console, f"{table.name}  (schema {table.schema_version}, sha256 {table.sha256[:16]}...)")
    revision = f" at {model.revision}" if model.revision else ""
    _line(
        console,
        f"model        {model.id}{revision}: {model.architecture}, {model.num_layers} layers, "
        f"{model.num_kv_heads} KV heads for {model.num_attention_heads} query heads, fingerprint "
        f"{model.fingerprint[:12]}...",
    )
    _line(console, f"policy       {policy_line(table.policy)}")
    _line(
        console,
        f"calibration  {calibration_line(table)}, data {table.calibration.data_sha256[:12]}...",
    )
    search = table.search
    _line(
        console,
        f"search       {search.trials} trials by {search.sampler}, study "
        f"{search.study!r} ({search.storage}), {search.wall_seconds:.0f} s of measuring",
    )
    _line(console, f"made         {table.created_at.isoformat()} by version {table.tool_version}")
    _line(console, "")
    _figures(console, table)
    _stages(console, table)
    _verdict(console, table)
    _line(console, "")
    heat_map(console, table.policy)


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print an evaluation: for each task and size one line per policy, and the comparisons."""
    for task in evaluation.tasks:
        _line(
            console,
            f"{task.name} ({task.split}): {task.examples} examples, {task.tokens} tokens, "
            f"{task.counted} positions counted, "
            + ("exact prefill" if not task.prefill_chunk else f"blocks of {task.prefill_chunk}")
            + (f"; accuracy is the share of {task.questions} questions" if task.questions else "")
            + (f" by {task.accuracy}" if task.accuracy else ""),
        )
        for size in dict.fromkeys(cell.size for cell in evaluation.cells if cell.size):
            _line(console, "")
            rows = [[str(size), *HEADINGS.values()]]
            for policy in evaluation.policies:
                cell = evaluation.cell(task.name, policy.name, size)
                if cell is not None:
                    figures = (getattr(cell, name) for name in HEADINGS)
                    rows.append([policy.name, *(figure(one) if one else "-" for one in figures)])
            for line in columns(rows):
                _line(console, f"  {line}")
            for comparison in evaluation.main_comparisons(task.name, size):
                _line(console, comparison_line(comparison))
        _line(console, "")


def comparison_line(comparison: Comparison) -> str:
    """Return one comparison in one line."""
    gap = figure(comparison.difference, sign=True)
    word = "differs" if comparison.p_holm < SIGNIFICANT else "not shown to differ"
    return (
        f"    {comparison.policy} minus {comparison.baseline}: KL {gap}, "
        f"p after Holm {comparison.p_holm:.2g}: {word}"
    )


def heat_map(console: Console, policy: TablePolicy) -> None:
    """Print alpha, half-life and slots by layer and head; coloured on a terminal."""
    multiples = slots(policy)
    below = "the half-life of a score in tokens below it"
    if multiples:
        below = f"{below}, and then the head's slots in multiples of the budget"
    _line(console, f"alpha by layer and KV head, with {below}")
    heads = len(policy.alpha[0])
    _line(console, "layer " + "".join(f"{f'head {head}':>9}" for head in range(heads)))
    for layer, row in enumerate(policy.alpha):
        lines = [[f"{alpha:.4g}" for alpha in row], [half_life(alpha) for alpha in row]]
        if multiples:
            lines.append([f"{multiple:.2f}x" for multiple in multiples[layer]])
        for number, line in enumerate(lines):
            text = Text(f"{'' if number else layer:>5} ")
            for alpha, shown in zip(row, line, strict=True):
                text.append(f"{shown:>8} ", _style(alpha))
            console.print(text, soft_wrap=True)


def _verdict(console: Console, table: AlphaTable, remedy: str | None = None) -> None:
    for line in (verdict_line(table), advice_line(table), caution_line(table, remedy)):
        if line is not None:
            _line(console, line)


def _figures(console: Console, table: AlphaTable) -> None:
    evidence = table.evidence
    _line(
        console,
        f"{evidence.examples} held-out examples of {evidence.dataset} ({evidence.split}): "
        f"{evidence.objective}; {evidence.confidence:.0%} intervals",
    )
    p = {name: f"{value:.2g}" for name, value in evidence.p_holm.items()}
    rows = [
        ["", "cost", "fitted table minus this, paired", "p after Holm" if p else ""],
        ["fitted table", figure(evidence.table), "", ""],
        *(
            [name, figure(value), figure(evidence.paired[name], sign=True), p.get(name, "")]
            for name, value in evidence.baselines.items()
        ),
    ]
    for line in columns(rows):
        _line(console, f"  {line}")


def _stages(console: Console, table: AlphaTable) -> None:
    stages = table.search.stages
    if not stages:
        return
    _line(console, "")
    head = ["stage", "trials", "evaluations", "time", "calibration", "held out"]
    rows = [
        [*head, "minus best uniform, paired"],
        *(
            [
                stage.name,
                f"{stage.trials}",
                f"{stage.evaluations:.1f}",
                duration(stage.seconds),
                f"{stage.calibration:.4f}",
                figure(stage.held_out),
                figure(stage.paired, sign=True),
            ]
            for stage in stages
        ),
    ]
    for line in columns(rows, right=range(1, 5)):
        _line(console, f"  {line}")


def _style(alpha: float) -> Style:
    """From dark blue (short memory) to light yellow (long memory), on the scale of log tau."""
    share = log_tau_of(alpha) / LOG_TAU_MAX
    dark, light = (20, 30, 90), (250, 230, 120)
    red, green, blue = (low + share * (high - low) for low, high in zip(dark, light, strict=True))
    ink = "black" if share > 0.5 else "white"
    return Style(color=ink, bgcolor=Color.from_rgb(red, green, blue))


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
