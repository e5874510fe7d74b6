"""The HTML report of a table: all that the file says, in order, and only evaluations of it."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from a2sf.errors import InvalidArgument, NotFound
from a2sf.schema import AlphaTable, Estimate
from a2sf.tablefile import save_table
from tests.tables import (
    BASELINES,
    IDENTITY,
    STAGES,
    brought_up,
    fitted_table,
    make_table,
    not_better,
)
from tests.tuner.pages import RATIOS, Page, evaluation
from tuner.__main__ import main
from tuner.evaluation.results import Evaluation, Policy
from tuner.report.sentences import advice_line, caution_line, half_life, slots, verdict_line
from tuner.report.table_page import load_evaluation, render

LARGE = IDENTITY.model_copy(update={"num_layers": 32, "num_kv_heads": 8})


TABLES = {
    "small": fitted_table(IDENTITY),
    "large": fitted_table(LARGE, seed=1),
    "version 1": brought_up(IDENTITY),
    "in tokens": make_table(IDENTITY),
}


@pytest.fixture(scope="module", params=TABLES.values(), ids=TABLES.keys())
def rendered(request: pytest.FixtureRequest) -> tuple[AlphaTable, str]:
    return request.param, render(request.param)


def short(estimate: Estimate, sign: str = "") -> str:
    """What these tables' figures look like, none of which is small."""
    return (
        f"{estimate.mean:{sign}.4f} [{estimate.low:{sign}.4f}, {estimate.high:{sign}.4f}]".replace(
            "-0.0000", "+0.0000"
        )
    )


def test_every_alpha_half_life_and_share_is_on_the_page(rendered: tuple[AlphaTable, str]) -> None:
    table, text = rendered
    multiples = slots(table.policy)
    caption = "Alpha, the half-life of a score in tokens"
    if multiples:
        caption += ", and the slots in multiples of the budget"
    rows = Page(text).under(caption)[1:]
    assert len(rows) == table.model.num_layers
    for layer, (row, alphas) in enumerate(zip(rows, table.policy.alpha, strict=True)):
        cells = [f"{alpha:.4g} ({half_life(alpha)})" for alpha in alphas]
        if multiples:
            shares = [f"{multiple:.2f}x" for multiple in multiples[layer]]
            cells = [f"{cell}, {share}" for cell, share in zip(cells, shares, strict=True)]
        assert row == [str(layer), *cells]


def test_every_cost_difference_and_p_is_on_the_page() -> None:
    table = fitted_table(IDENTITY)
    evidence = table.evidence
    head, ours, *rows = Page(render(table)).under("Held-out cost")
    assert head[-1] == "p, Holm"
    assert ours == ["fitted table", short(evidence.table), "", ""]
    names = ["uniform (.93, recent half, sinks 4)", *list(BASELINES)[1:]]
    assert rows == [
        [shown, short(evidence.baselines[name]), short(evidence.paired[name], "+"), f"{p:.4f}"]
        for shown, (name, (_, p)) in zip(names, BASELINES.items(), strict=True)
    ]


def test_a_table_from_before_p_values_and_stages_has_no_place_for_them() -> None:
    page = Page(render(brought_up(IDENTITY)))
    rows = page.under("Held-out cost")
    assert [row[0] for row in rows[1:3]] == ["fitted table", "uniform"]
    assert {len(row) for row in rows} == {3}
    assert "Stages of the search" not in page.captions
    assert len(page.pictures()) == 2


def test_stages_are_listed_and_drawn_in_order() -> None:
    text = render(fitted_table(IDENTITY))
    page = Page(text)
    assert page.under("Stages of the search")[1:] == [
        [
            f"{place + 1} {stage.name}",
            str(stage.trials),
            f"{stage.evaluations:.1f}",
            total,
            f"{stage.seconds:.0f}",
            f"{stage.calibration:.4f}",
            short(stage.held_out),
            short(stage.paired, "+"),
        ]
        for place, (stage, total) in enumerate(zip(STAGES, ("40.5", "62.8", "211.5"), strict=True))
    ]
    assert "1 uniform, 2 slots of layers, 3 alphas of heads" in page.pictures()[-1]
    drawn = re.findall(r"<svg.*?</svg>", text, re.S)[-1]
    assert re.findall(r">(\d)</text>", drawn) == ["0", "1", "2", "3"]  # an axis's nought, stages
    for line in ("calibration, best so far", "held out", "best uniform, held out"):
        assert f">{line}</text>" in drawn
    assert "uniform 10.0%, slots of layers 15.0%, alphas of heads 75.0%" in text
    assert "took 26 min. Measuring took 50 min" in text


def test_the_verdict_comes_before_its_reasons() -> None:
    table = fitted_table(IDENTITY)
    text = render(table, together(table))
    parts = [
        "the table costs less than the best uniform alpha (.93, recent half, sinks 4): "
        "table minus uniform -0.0130 [-0.0156, -0.0097] nats, -21\u00a0%.",
        ">Comparison at equal budget<",
        ">Alphas and slots by head<",
        ">Search<",
        ">Provenance<",
        ">Quality over budgets<",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


@pytest.mark.parametrize("kept", [False, True])
def test_the_page_gives_the_figures_of_the_policy_that_the_file_carries(kept: bool) -> None:
    text = render(not_better(kept=kept)).replace("\u00a0", " ")
    uniform, fitted = "in the file loses 0.305 nats", "in the file loses 0.052 nats"
    right, wrong = (fitted, uniform) if kept else (uniform, fitted)
    assert right in text
    assert wrong not in text
    assert ("The file carries the best uniform setting" in text) != kept


@pytest.mark.parametrize("name", ["small", "version 1", "in tokens"])
def test_the_page_says_the_verdict_of_the_text(name: str) -> None:
    table = TABLES[name]
    better = table.evidence.verdict == "better"
    line = verdict_line(table)
    assert line.startswith("Better: " if better else "Not shown to be better than uniform: ")
    text = render(table)
    assert line in text.replace("\u00a0", " ")
    assert ('<p class="verdict better">' in text) == better


def test_the_page_says_whether_to_use_the_table_and_is_not_green_from_few_examples() -> None:
    table = fitted_table(IDENTITY)
    text = render(table)
    assert advice_line(table) in text
    assert "caution" not in text.split("<body>")[1]
    few = table.model_copy(update={"evidence": table.evidence.model_copy(update={"examples": 4})})
    text = render(few)
    assert caution_line(few) in text
    assert '<p class="verdict better">' not in text


def test_the_page_of_a_uniform_table_calls_it_uniform() -> None:
    said = "The file carries the best uniform setting"
    assert said in render(not_better(kept=False))
    assert said not in render(fitted_table(IDENTITY))


def test_unequal_slots_are_drawn_beside_the_alphas() -> None:
    text = render(make_table(IDENTITY, head_share=((6.0, 2.0), (3.0, 1.0))))
    assert text.count("2.00x") == 2  # in the picture and in the figures
    assert text.count("0.33x") == 2
    slots, alphas = Page(text).pictures()[1:3]
    assert "in multiples of the budget" in slots
    assert "half-life" in alphas
    assert "on average over" in text
    equal = render(make_table(IDENTITY, head_share=((2.0, 2.0), (2.0, 2.0))))
    assert ">slots<" not in equal
    assert "multiples of the budget" not in equal
    assert "on average over" not in equal


def test_costs_further_apart_than_a_decade_have_a_log_axis() -> None:
    def ticks(**costs: float) -> list[str]:
        evidence = fitted_table(IDENTITY).evidence
        baselines = {name: Estimate(mean=cost, low=cost, high=cost) for name, cost in costs.items()}
        updated = evidence.model_copy(update={"baselines": baselines})
        svg = re.search(r"<svg.*?</svg>", render(fitted_table(IDENTITY, evidence=updated)), re.S)
        assert svg is not None
        return re.findall(r">([\d.]+)</text>", svg[0])

    assert ticks(uniform=0.06, random=0.9) == ["0.05", "0.1", "0.2", "0.5", "1"]
    assert ticks(uniform=0.06, random=0.1) == ["0.05", "0.06", "0.07", "0.08", "0.09", "0.10"]


def test_the_data_file_has_the_name_that_the_page_says(rendered: tuple[AlphaTable, str]) -> None:
    table, text = rendered
    for said in (
        table.name,
        table.sha256,
        table.model.fingerprint,
        table.calibration.data_sha256,
        f"{table.calibration.tokens} tokens, seed {table.calibration.seed}",
        f"{table.search.trials} trials by {table.search.sampler}, study",
        f"by version {table.tool_version}",
        table.created_at.strftime("%Y-%m-%d %H:%M"),
        f"sinks {table.policy.sinks}, recent",
        f"{table.evidence.examples} held-out",
        "95 % intervals",
    ):
        assert said in text


def test_nothing_is_loaded_and_everything_has_a_name(rendered: tuple[AlphaTable, str]) -> None:
    text = rendered[1]
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not {"script", "link", "img", "image", "iframe", "object"} & tags
    assert "://" not in text
    assert not re.search(r"url\((?!#)|@import|\ssrc=", text)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(page.pictures())
    assert len(page.captions) == len(page.tables)
    assert all(len({len(row) for row in rows}) == 1 for rows in page.tables)


HOSTILE = "<script>alert('x')</script>"


def test_names_stay_names() -> None:
    table = fitted_table(IDENTITY)
    evidence = table.evidence
    figure = evidence.baselines["h2o"]
    table = fitted_table(
        IDENTITY,
        model=IDENTITY.model_copy(update={"id": HOSTILE, "revision": HOSTILE}),
        calibration=table.calibration.model_copy(update={"dataset": HOSTILE, "split": HOSTILE}),
        evidence=evidence.model_copy(
            update={
                "objective": HOSTILE,
                "dataset": HOSTILE,
                "baselines": {**evidence.baselines, HOSTILE: figure},
                "paired": {**evidence.paired, HOSTILE: figure},
                "p_holm": {**evidence.p_holm, HOSTILE: 0.5},
            }
        ),
        search=table.search.model_copy(
            update={
                "sampler": HOSTILE,
                "study": HOSTILE,
                "stages": (STAGES[0].model_copy(update={"name": HOSTILE}), *STAGES[1:]),
            }
        ),
        tool_version=HOSTILE,
    )
    text = render(table, together(table, tasks=(HOSTILE,), command=HOSTILE))
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.under("Held-out cost")[-1][0] == HOSTILE
    assert page.under("Stages of the search")[1][0] == f"1 {HOSTILE}"
    assert text.count("&lt;script&gt;") > 10


def test_the_same_table_gives_the_same_page() -> None:
    table, again = (fitted_table(IDENTITY) for _ in range(2))
    assert render(table, together(table)) == render(again, together(again))


def together(table: AlphaTable, **options: Any) -> Evaluation:
    """An evaluation in which `table` took part, under a name of its own."""
    policy = Policy(
        name="ours", description="a table", alpha=table.policy.alpha, sha256=table.sha256
    )
    return evaluation(**{"tables": [policy], "model": table.model, **options})


def test_an_evaluation_of_the_table_adds_curves_and_comparisons(tmp_path: Path) -> None:
    table = fitted_table(IDENTITY)
    document = together(table)
    path = tmp_path / "e.json"
    path.write_text(document.model_dump_json(), encoding="utf-8")
    found = load_evaluation(path, table)
    assert found == document
    page = Page(render(table, found))
    assert page.pictures()[-1].startswith("mathqa, 1-shot: attention similarity over the size")
    rows = page.under("mathqa, 1-shot: KL of this table minus that of others, nats")[1:]
    assert [row[:2] for row in rows] == [[str(size), "h2o"] for size in RATIOS[:3]]
    differences = [c for c in document.comparisons if (c.policy, c.metric) == ("ours", "kl")]
    assert [row[2] for row in rows] == [short(row.difference, "+") for row in differences]


def test_an_evaluation_may_know_the_model_by_a_newer_fingerprint(tmp_path: Path) -> None:
    table = fitted_table(IDENTITY)
    path = tmp_path / "e.json"
    path.write_text(
        together(
            table, model=IDENTITY.model_copy(update={"fingerprint": "b" * 64})
        ).model_dump_json(),
        encoding="utf-8",
    )
    assert load_evaluation(path, table).model.fingerprint == "b" * 64


OTHER = IDENTITY.model_copy(update={"id": "other", "fingerprint": "b" * 64})


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("not JSON", "is not what evaluate --json writes: Invalid JSON"),
        ('{"format": 1}', "is not what evaluate --json writes: created_at: Field required"),
        (
            together(fitted_table(OTHER), model=OTHER).model_dump_json(),
            "is of model 'other' (fingerprint bbbbbbbbbbbb...), and table 'fitted' was made",
        ),
        (
            together(fitted_table(IDENTITY, seed=1)).model_dump_json(),
            "did not compare table 'fitted' (sha256 ",
        ),
    ],
    ids=["no JSON", "no evaluation", "another model", "another table of that name"],
)
def test_a_foreign_evaluation_is_refused(tmp_path: Path, written: str, told: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(written, encoding="utf-8")
    with pytest.raises(InvalidArgument, match=r"^--evaluation: .*e\.json ") as caught:
        load_evaluation(path, fitted_table(IDENTITY))
    assert told in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_evaluation_is_reported() -> None:
    with pytest.raises(NotFound, match=r"^--evaluation /nowhere: No such file or directory$"):
        load_evaluation(Path("/nowhere"), fitted_table(IDENTITY))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["a2sf-tune", "report", *map(str, arguments)])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command_writes_the_page_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = fitted_table(IDENTITY)
    file, html, json = (tmp_path / name for name in ("t.json", "t.html", "e.json"))
    save_table(table, file)
    json.write_text("{}", encoding="utf-8")
    assert command(monkeypatch, file, "--html", html, "--evaluation", json) == 2
    assert capsys.readouterr().err.startswith(f"error: --evaluation: {json} is not what")
    assert not html.exists()
    json.write_text(together(table).model_dump_json(), encoding="utf-8")
    assert command(monkeypatch, file, "--html", html, "--evaluation", json) == 0
    assert capsys.readouterr().out == f"Wrote {html}.\n"
    assert html.read_text(encoding="utf-8") == render(table, together(table))
    assert command(monkeypatch, file, "--html", html) == 0
    assert html.read_text(encoding="utf-8") == render(table)
    assert command(monkeypatch, file, "--html", "/proc/nowhere/x.html") == 2
    told = "--html: /proc/nowhere/x.html cannot be written"
    assert told in capsys.readouterr().err
