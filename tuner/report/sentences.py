"""Says in sentences what a table is: its policy, its data, its verdict, and advice on its use.

Owns the wording, which the terminal and the HTML page share. All figures come from the table, so a
file shown later gives the same figures as the fit. Knows nothing of colours or of pages.
"""

import math
from collections.abc import Collection, Sequence

from a2sf.cache.slot_shares import Shares
from a2sf.schema import AlphaTable, Estimate, TablePolicy, UniformSetting
from tuner.evaluation import statistics
from tuner.settings import MORE_SEQUENCES, few_examples_line

HIGH_KL = 0.5
"""KL in nats per token above which a cache changes a model's output, whatever the table."""


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
    interval = f"table minus uniform {figure(gap, sign=True)} nats, {share:+.0f} %"
    named = "the best uniform alpha"
    if evidence.uniform is not None:
        named += f" ({setting_words(evidence.uniform)})"
    if evidence.verdict == "better":
        return f"Better: on held-out examples the table costs less than {named}: {interval}."
    carried = (
        "that uniform setting"
        if carries_uniform(table)
        else "the fitted table, as --keep-table asked"
    )
    return (
        f"Not shown to be better than uniform: held-out examples do not show the table below "
        f"{named}: {interval}. The file carries {carried}."
    )


def setting_words(setting: UniformSetting) -> str:
    """Return a uniform setting in few words."""
    recent = "half" if setting.recent_share == 0.5 else _short(setting.recent_share)
    return f"{_short(setting.alpha)}, recent {recent}, sinks {setting.sinks}"


def advice_line(table: AlphaTable) -> str:
    """Return the advice on a table: its verdict, and the loss of the policy that the file carries.

    The evidence has no NLL of the uniform setting, so the loss of that one is its KL alone.
    """
    evidence = table.evidence
    if carries_uniform(table):
        what, kl, nll = "the uniform setting in the file", evidence.baselines["uniform"], None
    else:
        what = "it" if evidence.verdict == "better" else "the fitted table in the file"
        kl, nll = evidence.table, evidence.lost_nll
    lost = f"{what} loses {kl.mean:.3g} nats of KL a token against the full cache"
    if nll is not None:
        # Rounded before formatting, and + 0.0, to avoid "-0".
        more = round(100 * math.expm1(min(nll.mean, 100.0)), 1) + 0.0
        lost += (
            f", and the true next token costs {figure(nll, sign=True)} nats more "
            f"(perplexity {more:+.3g} %)"
        )
    if kl.mean > HIGH_KL:
        return f"The budget is too small to serve well: {lost}; fit one with a larger budget."
    if evidence.verdict == "better":
        return f"Use this table: {lost}."
    few = ""
    if evidence.examples < enough_examples(table):
        few = f", for which {evidence.examples} held-out examples are too few"
    return (
        f"It is not shown that a table with an alpha per head is better than one uniform setting"
        f"{few}: {lost}."
    )


def caution_line(table: AlphaTable, remedy: str | None = None) -> str | None:
    """Return a warning if the held-out examples are too few for the verdict, or None.

    `remedy` is what gives more of them. Only the fit knows it; without it, the line names all that
    may help.
    """
    evidence = table.evidence
    remedy = remedy or (
        f"a larger --holdout; if the data gives no more sequences, {MORE_SEQUENCES}; and if the "
        "time cut the proof, more --minutes"
    )
    return few_examples_line(evidence.examples, enough_examples(table), remedy)


def enough_examples(table: AlphaTable) -> int:
    """The fewest held-out examples that can show a difference among the table's comparisons."""
    return statistics.enough_examples(max(len(table.evidence.p_holm), 1))


def carries_uniform(table: AlphaTable) -> bool:
    """Whether the file carries the best uniform setting in place of the fitted table."""
    policy, best = table.policy, table.evidence.uniform
    if table.evidence.verdict == "better" or not is_uniform(policy):
        return False
    # A kept table may have one alpha as well, with another protection.
    return best is None or (
        (policy.alpha[0][0], policy.recent_share, policy.sinks)
        == (best.alpha, best.recent_share, best.sinks)
    )


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


def half_life(alpha: float) -> str:
    """Tokens until a score has halved: 0 if only the last query counts, inf if nothing fades."""
    if alpha in (0.0, 1.0):
        return "0" if alpha == 0.0 else "inf"
    return f"{-math.log(2) / math.log(alpha):.3g}"


def figure(value: Estimate, *, sign: bool = False) -> str:
    """Format a mean and its interval with four decimals."""
    form = "+.4f" if sign else ".4f"
    # Rounded before formatting, and + 0.0, to avoid "-0.0000".
    mean, low, high = (round(x, 4) + 0.0 for x in (value.mean, value.low, value.high))
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def columns(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Return rows of cells as lines: columns as wide as their widest cell, two spaces apart.

    `right` has the places of the columns that are aligned to the right.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _short(value: float) -> str:
    """Format a number without a leading zero."""
    return f"{value:.4g}".removeprefix("0") or "0"
