"""What a person reads: verdicts that say what the file carries, and the heat map."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from a2sf.model.loader import LoadedModel
from a2sf.schema import AlphaTable, Estimate, UniformSetting
from tests.tables import BASELINES, IDENTITY, brought_up, fitted_table, make_table, not_better
from tests.tuner.pages import RATIOS, evaluation
from tuner.report.sentences import (
    advice_line,
    caution_line,
    half_life,
    is_uniform,
    policy_line,
    verdict_line,
)
from tuner.report.terminal import heat_map, print_evaluation, show
from tuner.settings import FEW_EXAMPLES, more_examples

TABLE = ((0.0, 0.5), (0.9, 1.0), (0.3, 0.99))
UNIFORM = ((0.9, 0.9),) * 3


def judged(model: LoadedModel, verdict: str, alpha: Any, gap: tuple[float, ...]) -> AlphaTable:
    table = make_table(model.identity, alpha=alpha, recent=None, recent_share=0.25, sinks=4)
    mean, low, high = gap
    evidence = table.evidence.model_copy(
        update={
            "verdict": verdict,
            "paired": {"uniform": Estimate(mean=mean, low=low, high=high)},
            "baselines": {"uniform": Estimate(mean=0.2, low=0.1, high=0.3)},
        }
    )
    return table.model_copy(update={"evidence": evidence})


def test_a_better_table_is_reported_with_interval_and_share(tiny_model: LoadedModel) -> None:
    line = verdict_line(judged(tiny_model, "better", TABLE, (-0.05, -0.07, -0.03)))
    assert line == (
        "Better: on held-out examples the table costs less than the best uniform alpha "
        "(.9, recent .25, sinks 4): table minus uniform -0.0500 [-0.0700, -0.0300] nats, -25 %."
    )


@pytest.mark.parametrize(
    ("alpha", "carried"),
    [
        (UNIFORM, "carries that uniform setting"),
        (TABLE, "carries the fitted table, as --keep-table asked"),
    ],
)
def test_the_verdict_of_a_table_that_is_not_better_names_the_contents_of_the_file(
    tiny_model: LoadedModel, alpha: Any, carried: str
) -> None:
    line = verdict_line(judged(tiny_model, "no_better_than_uniform", alpha, (0.01, -0.01, 0.03)))
    assert line.startswith("Not shown to be better than uniform: ")
    assert "+0.0100 [-0.0100, +0.0300] nats, +5 %" in line
    assert carried in line


def told(**evidence: Any) -> AlphaTable:
    table = fitted_table(IDENTITY)
    return table.model_copy(update={"evidence": table.evidence.model_copy(update=evidence)})


def test_the_advice_has_the_loss_and_a_recommendation() -> None:
    lost = Estimate(mean=0.011, low=0.005, high=0.017)
    assert advice_line(told(lost_nll=lost)) == (
        "Use this table: it loses 0.048 nats of KL a token against the full cache, and the true "
        "next token costs +0.0110 [+0.0050, +0.0170] nats more (perplexity +1.1 %)."
    )
    # From before likelihoods were kept.
    assert advice_line(told()) == (
        "Use this table: it loses 0.048 nats of KL a token against the full cache."
    )


def test_the_advice_gives_the_kl_of_the_uniform_setting_if_the_file_carries_it() -> None:
    assert advice_line(not_better(kept=False)) == (
        "It is not shown that a table with an alpha per head is better than one uniform setting: "
        "the uniform setting in the file loses 0.305 nats of KL a token against the full cache."
    )


def test_the_advice_gives_the_figures_of_a_kept_table() -> None:
    assert advice_line(not_better(kept=True)) == (
        "It is not shown that a table with an alpha per head is better than one uniform setting: "
        "the fitted table in the file loses 0.052 nats of KL a token against the full cache, and "
        "the true next token costs +0.0110 [+0.0100, +0.0125] nats more (perplexity +1.1 %)."
    )


@pytest.mark.parametrize(("kept", "figures"), [(False, "loses 0.305 "), (True, "loses 0.052 ")])
def test_the_shown_advice_is_of_the_policy_that_the_file_carries(kept: bool, figures: str) -> None:
    (line,) = (line for line in shown(not_better(kept=kept)) if line.startswith("It is not shown"))
    assert figures in line


def test_a_kept_table_of_one_alpha_is_not_taken_for_the_best_uniform_setting() -> None:
    table = not_better(kept=False)
    kept = table.model_copy(update={"policy": table.policy.model_copy(update={"sinks": 0})})
    assert "the fitted table in the file loses 0.052 nats" in advice_line(kept)
    assert "carries the fitted table, as --keep-table asked" in verdict_line(kept)


def test_the_advice_says_that_the_examples_are_too_few_for_a_verdict() -> None:
    assert (
        "better than one uniform setting, for which 5 held-out examples are too few: the uniform"
        in advice_line(not_better(kept=False, examples=5))
    )


def test_a_cache_with_a_high_kl_is_never_recommended() -> None:
    poor, good = Estimate(mean=4.63, low=4.2, high=5.1), Estimate(mean=0.1, low=0.1, high=0.1)
    end = "; fit one with a larger budget."
    line = advice_line(told(table=poor, lost_nll=poor))
    assert line.startswith("The budget is too small to serve well: it loses 4.63 nats")
    assert line.endswith(end)
    kept = advice_line(not_better(kept=True, table=poor, baselines={"uniform": good}))
    assert kept.startswith("The budget is too small to serve well: the fitted table in the file")
    uniform = advice_line(not_better(kept=False, table=good, baselines={"uniform": poor}))
    assert uniform == (
        "The budget is too small to serve well: the uniform setting in the file loses 4.63 nats of "
        f"KL a token against the full cache{end}"
    )


def test_the_high_kl_of_a_policy_that_the_file_does_not_carry_is_no_reason_to_refuse_it() -> None:
    poor, good = Estimate(mean=4.63, low=4.2, high=5.1), Estimate(mean=0.1, low=0.1, high=0.1)
    for kept, figures in ((True, {"table": good}), (False, {"baselines": {"uniform": good}})):
        others = {"table": poor, "baselines": {"uniform": poor}, **figures}
        assert "loses 0.1 nats" in advice_line(not_better(kept=kept, **others))
        assert "too small" not in advice_line(not_better(kept=kept, **others))


def test_too_few_examples_are_named_with_everything_that_may_help() -> None:
    assert caution_line(told()) is None
    few = caution_line(told(examples=FEW_EXAMPLES - 1))
    assert few is not None
    assert few.startswith(
        f"Few examples: {FEW_EXAMPLES - 1} held-out examples give rough intervals"
    )
    none = caution_line(told(examples=4))
    assert none == (
        "Too few examples: 4 held-out examples cannot show a difference after the correction for "
        "all comparisons. A verdict needs at least 8, and good intervals 16. What helps: a larger "
        "--holdout; if the data gives no more sequences, more rows in the data, or a smaller "
        "--length; and if the time cut the proof, more --minutes."
    )


@pytest.mark.parametrize(
    ("made", "available", "used", "helps"),
    [
        (5, 5, 5, "more rows in the data, or a smaller --length"),
        (5, 16, 5, "--holdout 16 or more"),
        (60, 60, 9, "more --minutes"),
        (12, 12, 9, "more --minutes, and more rows in the data, or a smaller --length"),
    ],
)
def test_the_advice_on_few_examples_says_how_to_get_more(
    made: int, available: int, used: int, helps: str
) -> None:
    assert more_examples(made=made, available=available, used=used) == helps


def test_the_advice_and_the_caution_stand_below_the_verdict() -> None:
    table = told(examples=4)
    lines = shown(table)
    at = lines.index(verdict_line(table))
    assert lines[at + 1 : at + 3] == [advice_line(table), caution_line(table)]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ((0.93, 0.5, 4), "(.93, recent half, sinks 4)"),
        ((0.99545678, 0.125, 0), "(.9955, recent .125, sinks 0)"),
        ((1.0, 0.0, 4), "(1, recent 0, sinks 4)"),
        ((0.0, 0.0, 4), "(0, recent 0, sinks 4)"),
    ],
)
def test_the_best_uniform_setting_is_printed_with_all_its_values(
    setting: tuple[float, float, int], words: str
) -> None:
    alpha, recent_share, sinks = setting
    uniform = UniformSetting(alpha=alpha, recent_share=recent_share, sinks=sinks)
    evidence = fitted_table(IDENTITY).evidence.model_copy(update={"uniform": uniform})
    assert f"alpha {words}: table minus" in verdict_line(fitted_table(IDENTITY, evidence=evidence))


def test_old_tables_without_a_best_uniform_setting_show_none() -> None:
    evidence = fitted_table(IDENTITY).evidence.model_copy(update={"uniform": None})
    line = verdict_line(fitted_table(IDENTITY, evidence=evidence))
    assert "less than the best uniform alpha: table minus" in line


def test_a_table_of_one_alpha_and_unequal_slots_is_not_uniform() -> None:
    policy = make_table(IDENTITY, alpha=((0.9, 0.9),) * 2).policy
    assert is_uniform(policy)
    # Weights, not shares of a sum: any equal ones are equal slots.
    assert is_uniform(policy.model_copy(update={"head_share": ((3.0, 3.0), (3.0, 3.0))}))
    assert not is_uniform(policy.model_copy(update={"head_share": ((3.0, 3.0), (3.0, 1.0))}))


def shown(table: AlphaTable) -> list[str]:
    file = StringIO()
    show(Console(file=file), table)
    return file.getvalue().splitlines()


def test_stages_are_a_line_each_in_order() -> None:
    lines = shown(fitted_table(IDENTITY))
    (head,) = (i for i, line in enumerate(lines) if line.startswith("  stage "))
    assert [line.split("  ")[1] for line in lines[head + 1 : head + 4]] == (
        ["uniform", "slots of layers", "alphas of heads"]
    )
    assert " ".join(lines[head + 2].split()) == (
        "slots of layers 31 22.2 8 min 0.0430 0.0510 [0.0460, 0.0590] -0.0100 [-0.0130, -0.0070]"
    )


def test_each_paired_difference_has_its_corrected_p() -> None:
    lines = shown(fitted_table(IDENTITY))
    (head,) = (i for i, line in enumerate(lines) if line.endswith("p after Holm"))
    for line, (name, (_, p)) in zip(lines[head + 2 :], BASELINES.items(), strict=False):
        assert (line.split()[0], line.split()[-1]) == (name, f"{p:.2g}")


def test_columns_of_large_figures_do_not_touch() -> None:
    large = Estimate(mean=11.8281, low=10.478, high=13.1781)
    table = told(table=large, baselines={"uniform": large}, paired={"uniform": large})
    stage = table.search.stages[0].model_copy(update={"held_out": large, "paired": large})
    table = table.model_copy(
        update={"search": table.search.model_copy(update={"stages": (stage,)})}
    )
    text, row = "11.8281 [10.4780, 13.1781]", "+11.8281 [+10.4780, +13.1781]"
    assert len([line for line in shown(table) if f"  {text}  {row}" in line]) == 2


def test_columns_of_an_evaluation_do_not_touch() -> None:
    large = Estimate(mean=11.8281, low=10.478, high=13.1781)
    honest = evaluation(sizes=RATIOS[:1])
    cells = tuple(
        cell.model_copy(update={"kl": large, "nll": large}) if cell.size else cell
        for cell in honest.cells
    )
    file = StringIO()
    print_evaluation(Console(file=file), honest.model_copy(update={"cells": cells}))
    text = "11.8281 [10.4780, 13.1781]"
    rows = [line for line in file.getvalue().splitlines() if text in line]
    assert rows
    for row in rows:
        assert f"  {text}  {text}  " in row


def test_a_table_from_before_stages_were_kept_prints_none() -> None:
    lines = shown(brought_up(IDENTITY))
    assert not [line for line in lines if "stage" in line or "Holm" in line or "slots" in line]


def test_unequal_slots_are_printed_in_multiples_of_the_budget() -> None:
    table = make_table(IDENTITY, head_share=((6.0, 2.0), (3.0, 1.0)))
    lines = drawn(table).splitlines()
    assert "slots in multiples of the budget" in lines[0]
    assert [lines[row].split() for row in (4, 7)] == [["2.00x", "0.67x"], ["1.00x", "0.33x"]]
    # Each stands below its alpha.
    assert len(set(map(len, lines[2:]))) == 1
    assert "slots" not in drawn(make_table(IDENTITY, head_share=((2.0, 2.0), (2.0, 2.0))))


@pytest.mark.parametrize(
    ("alpha", "tokens"), [(0.0, "0"), (0.5, "1"), (0.9, "6.58"), (0.999, "693"), (1.0, "inf")]
)
def test_a_half_life_is_in_tokens(alpha: float, tokens: str) -> None:
    assert half_life(alpha) == tokens


def drawn(table: AlphaTable, **options: Any) -> str:
    file = StringIO()
    heat_map(Console(file=file, **options), table.policy)
    return file.getvalue()


def test_the_heat_map_is_coloured_on_a_terminal_and_plain_elsewhere(
    tiny_model: LoadedModel,
) -> None:
    table = make_table(tiny_model.identity, alpha=TABLE)
    plain = drawn(table)
    coloured = drawn(table, force_terminal=True, color_system="truecolor")
    assert "\x1b" not in plain
    # Dark for what forgets at once, light for what never does.
    assert "\x1b[37;48;2;20;30;90m       0 " in coloured
    assert "\x1b[30;48;2;250;230;120m       1 " in coloured


def test_the_heat_map_of_many_heads_is_not_wrapped(tiny_model: LoadedModel) -> None:
    identity = tiny_model.identity.model_copy(update={"num_kv_heads": 32})
    table = make_table(identity, alpha=((0.5,) * 32,) * 3)
    lines = drawn(table, width=80).splitlines()
    assert len(lines) == 2 + 2 * 3
    assert max(map(len, lines)) > 280


def test_a_policy_line_uses_the_units_of_its_table(tiny_model: LoadedModel) -> None:
    fixed = make_table(tiny_model.identity, prefill_chunk=16).policy
    assert policy_line(fixed) == (
        "budget 24 tokens, sinks 2, recent 4 tokens, prefill in blocks of 16"
    )
    shares = {"budget": None, "budget_ratio": 0.2, "recent": None, "recent_share": 0.25}
    assert policy_line(make_table(tiny_model.identity, **shares).policy) == (
        "budget 0.2 of the length, sinks 2, recent 0.25 of the rest, exact prefill"
    )
    for floor, words in [(64, ", at least 64 tokens"), (0, ", no floor")]:
        line = policy_line(make_table(tiny_model.identity, min_budget=floor, **shares).policy)
        assert line.startswith(f"budget 0.2 of the length{words}, sinks 2, ")


def test_a_name_with_brackets_is_printed_unchanged(tiny_model: LoadedModel) -> None:
    # Console markup reads [bold] as a colour; provenance is data.
    identity = tiny_model.identity.model_copy(update={"id": "[bold]m[/bold]"})
    file = StringIO()
    show(Console(file=file), make_table(identity))
    assert "[bold]m[/bold]" in file.getvalue()
