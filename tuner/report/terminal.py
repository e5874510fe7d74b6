"""Prints a table for people: the figures with their intervals, the verdict, the heat map.

Owns the wording and the colours. All figures come from the table, so a file shown later gives the
same figures as the fit, except the likelihoods, which only the fit knows.
"""

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from a2sf.schema import AlphaTable, Estimate, TablePolicy, UniformSetting
from tuner.evaluation import statistics
from tuner.evaluation.results import SIGNIFICANT, Comparison, Evaluation, Metric
from tuner.progress import duration
from tuner.search.space import LOG_TAU_MAX, Shares, log_tau_of

if TYPE_CHECKING:
    from tuner.fit import Outcome

MUCH = 0.5
"""KL in nats per token above which a cache changes a model's output, whatever the table."""

FEW = 16
"""Number of held-out examples below which bootstrap intervals are rough."""

HEADINGS: dict[Metric, str] = {
    "kl": "KL to full, nats",
    "nll": "NLL, nats a token",
    "top1": "top-1 agreement",
    "accuracy": "accuracy",
    "similarity": "attention kept",
}


def summarise(
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
        "NLL, nats a token: " + ", ".join(f"{name} {_figure(value)}" for name, value in nll),
    )
    _line(console, "")
    _verdict(console, table)
    for note in outcome.notes:
        _line(console, note)
    _line(console, f"Study {study_kept}: run the same command again with more --trials to go on.")
    serve = ["--model", model, "--tables", str(out.parent), "--default-table", table.name]
    _line(console, f"Wrote {out}. Serve it: python -m service {shlex.join(serve)}")


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
        f"search       {search.trials} tables by {search.sampler}, study {search.study!r} "
        f"({search.storage}), {search.wall_seconds:.0f} s of measuring",
    )
    _line(console, f"made         {table.created_at.isoformat()} by version {table.tool_version}")
    _line(console, "")
    _figures(console, table)
    _stages(console, table)
    _verdict(console, table)
    _line(console, "")
    heat_map(console, table.policy)


def tabulate(console: Console, evaluation: Evaluation) -> None:
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
            _line(console, f"  {size!s:<18}" + "".join(f"{name:<26}" for name in HEADINGS.values()))
            for policy in evaluation.policies:
                cell = evaluation.cell(task.name, policy.name, size)
                if cell is not None:
                    figures = (getattr(cell, name) for name in HEADINGS)
                    shown = (f"{_figure(value) if value else '-':<26}" for value in figures)
                    _line(console, f"  {policy.name:<18}" + "".join(shown))
            for comparison in evaluation.decisive(task.name, size):
                _line(console, comparison_line(comparison))
        _line(console, "")


def comparison_line(comparison: Comparison) -> str:
    """Return one comparison in one line."""
    gap = _figure(comparison.difference, sign=True)
    word = "differs" if comparison.p_holm < SIGNIFICANT else "not shown to differ"
    return (
        f"    {comparison.policy} minus {comparison.baseline}: KL {gap}, "
        f"p after Holm {comparison.p_holm:.2g}: {word}"
    )


def policy_line(policy: TablePolicy) -> str:
    """Return everything in a policy except its alphas, in one line."""
    budget = (
        f"budget {policy.budget} tokens"
        if policy.budget is not None
        else f"budget {policy.budget_ratio:g} of the length"
    )
    if policy.min_budget is not None:
        budget += f", at least {policy.min_budget} tokens" if policy.min_budget else ", no floor"
    recent = (
        f"recent {policy.recent} tokens"
        if policy.recent is not None
        else f"recent {policy.recent_share:g} of the rest"
    )
    chunk = policy.prefill_chunk
    prefill = f"prefill in blocks of {chunk}" if chunk else "exact prefill"
    return f"{budget}, sinks {policy.sinks}, {recent}, {prefill}"


def calibration_line(table: AlphaTable) -> str:
    """Return the data that the alphas were fitted on, in one line."""
    data = table.calibration
    return (
        f"{data.examples} examples of {data.dataset} ({data.split}), {data.tokens} tokens, "
        f"seed {data.seed}"
    )


def verdict_line(table: AlphaTable) -> str:
    """Return the verdict in one sentence, with the interval that decides it."""
    evidence = table.evidence
    gap = evidence.paired["uniform"]
    uniform = evidence.baselines["uniform"].mean
    share = 100 * gap.mean / uniform if uniform else 0.0
    interval = f"table minus uniform {_figure(gap, sign=True)} nats, {share:+.0f} %"
    named = "the best uniform alpha"
    if evidence.uniform is not None:
        named += f" ({setting_words(evidence.uniform)})"
    if evidence.verdict == "better":
        return f"Better: on held-out examples the table costs less than {named}: {interval}."
    carried = (
        "that uniform alpha" if is_uniform(table.policy) else "the table all the same, as asked"
    )
    return (
        f"No better than uniform: held-out examples do not show the table below {named}: "
        f"{interval}. The file carries {carried}."
    )


def setting_words(setting: UniformSetting) -> str:
    """Return a uniform setting in few words."""
    recent = "half" if setting.recent_share == 0.5 else _short(setting.recent_share)
    return f"{_short(setting.alpha)}, recent {recent}, sinks {setting.sinks}"


def advice_line(table: AlphaTable) -> str:
    """Return the advice on a table in one sentence: its gain, and what the cache still loses."""
    evidence = table.evidence
    lost = f"it loses {evidence.table.mean:.3g} nats of KL a token against the full cache"
    nll = evidence.lost_nll
    if nll is not None:
        # Rounded before formatting, and + 0.0, to avoid "-0".
        more = round(100 * math.expm1(min(nll.mean, 100.0)), 1) + 0.0
        lost += (
            f", and the true next token costs {_figure(nll, sign=True)} nats more "
            f"(perplexity {more:+.3g} %)"
        )
    if evidence.table.mean > MUCH:
        return f"The budget is too small to serve well: {lost}; fit one with a larger budget."
    if evidence.verdict == "better":
        return f"Use this table: {lost}."
    return f"One uniform setting does as well: {lost}, and tuning each head gains nothing sure."


def caution_line(table: AlphaTable) -> str | None:
    """Return a warning if the held-out examples are too few for the verdict."""
    evidence = table.evidence
    compared = max(len(evidence.p_holm), 1)
    enough = statistics.enough_examples(compared)
    if evidence.examples < enough:
        return (
            f"Too few examples: {evidence.examples} held-out examples cannot show a difference "
            f"once {compared} comparisons are paid for; prove it with --holdout {FEW} or more, "
            f"and {enough} at the least."
        )
    if evidence.examples < FEW:
        return (
            f"Few examples: {evidence.examples} held-out examples give rough intervals; prove it "
            f"with --holdout {FEW} or more before relying on it."
        )
    return None


def is_uniform(policy: TablePolicy) -> bool:
    """Whether all heads share one alpha and have the same slots."""
    return len({alpha for row in policy.alpha for alpha in row}) == 1 and not slots(policy)


def slots(policy: TablePolicy) -> Shares:
    """Each head's slots in multiples of the budget, 1 on average; empty if all are equal."""
    weights = [weight for row in policy.head_share for weight in row]
    if len(set(weights)) == 1:
        return ()
    mean = math.fsum(weights) / len(weights)
    return tuple(tuple(weight / mean for weight in row) for row in policy.head_share)


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


def half_life(alpha: float) -> str:
    """Tokens until a score has halved: 0 if only the last query counts, inf if nothing fades."""
    if alpha in (0.0, 1.0):
        return "0" if alpha == 0.0 else "inf"
    return f"{-math.log(2) / math.log(alpha):.3g}"


def _verdict(console: Console, table: AlphaTable) -> None:
    for line in (verdict_line(table), advice_line(table), caution_line(table)):
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
    head = f"  {'':<14}{'cost':<28}{'fitted table minus this, paired':<33}"
    _line(console, f"{head}{'p after Holm' if p else ''}".rstrip())
    _line(console, f"  {'fitted table':<14}{_figure(evidence.table)}")
    for name, value in evidence.baselines.items():
        gap = _figure(evidence.paired[name], sign=True)
        _line(console, f"  {name:<14}{_figure(value):<28}{gap:<33}{p.get(name, '')}".rstrip())


def _stages(console: Console, table: AlphaTable) -> None:
    stages = table.search.stages
    if not stages:
        return
    _line(console, "")
    width = max(len("stage"), *(len(stage.name) for stage in stages)) + 2
    _line(
        console,
        f"  {'stage':<{width}}{'trials':>6}{'evaluations':>13}{'time':>12}{'calibration':>13}  "
        f"{'held out':<26}minus best uniform, paired",
    )
    for stage in stages:
        _line(
            console,
            f"  {stage.name:<{width}}{stage.trials:>6}{stage.evaluations:>13.1f}"
            f"{duration(stage.seconds):>12}{stage.calibration:>13.4f}  "
            f"{_figure(stage.held_out):<26}{_figure(stage.paired, sign=True)}",
        )


def _figure(value: Estimate, *, sign: bool = False) -> str:
    form = "+.4f" if sign else ".4f"
    # Rounded before formatting, and + 0.0, to avoid "-0.0000".
    mean, low, high = (round(x, 4) + 0.0 for x in (value.mean, value.low, value.high))
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _short(value: float) -> str:
    """Format a number without a leading zero."""
    return f"{value:.4g}".removeprefix("0") or "0"


def _style(alpha: float) -> Style:
    """From dark blue (short memory) to light yellow (long memory), on the scale of log tau."""
    share = log_tau_of(alpha) / LOG_TAU_MAX
    dark, light = (20, 30, 90), (250, 230, 120)
    red, green, blue = (low + share * (high - low) for low, high in zip(dark, light, strict=True))
    ink = "black" if share > 0.5 else "white"
    return Style(color=ink, bgcolor=Color.from_rgb(red, green, blue))


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
