"""The HTML report: everything is in it, nothing is loaded, and names stay names."""

import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2sf.schema import Estimate
from tests.tables import IDENTITY
from tests.tuner.pages import NAMES, RATIOS, SLOTS, Page, around, compared, evaluation, table
from tuner.evaluation.results import Evaluation, Metric
from tuner.report.evaluation_page import render
from tuner.report.pictures import LABEL_GAP, spread

DOCUMENTS: dict[str, dict[str, Any]] = {
    "several sizes": {},
    "one size": {"sizes": RATIOS[:1]},
    "slots": {"sizes": SLOTS},
    "ratios and slots": {"sizes": (*RATIOS[:2], SLOTS[0])},
    "no accuracy": {"accuracy": False},
    "a table": {"tables": [table()]},
    "two tasks": {"tasks": ("mathqa, 1-shot", "recall")},
    "the full cache alone": {"names": ("full",)},
    "without the full cache": {"names": ("window", "a2sf:0.5")},
    "no such policy known": {"names": ("full", "newest")},
    "nothing compared": {"comparisons": ()},
}


Rendered = tuple[Evaluation, str]


@pytest.fixture(scope="module", params=DOCUMENTS.values(), ids=DOCUMENTS.keys())
def rendered(request: pytest.FixtureRequest) -> Rendered:
    document = evaluation(**request.param)
    return document, render(document)


def test_every_policy_and_every_mean_is_in_the_tables(rendered: Rendered) -> None:
    document, text = rendered
    page = Page(text)
    for cell in document.cells:
        sizes = {c.size for c in document.cells if c.task == cell.task and c.size}
        for size in [cell.size] if cell.size else sizes or [None]:
            where = f"at {size}" if size else "full cache"
            rows = page.under(f"{cell.task}, {where}")
            (row,) = (row for row in rows if row[0] == cell.policy)
            told = " ".join(row)
            for e in (cell.kl, cell.nll):
                assert f" {e.mean:.4f} [{e.low:.4f}, {e.high:.4f}]" in told
            for share in (cell.top1, cell.accuracy, cell.similarity):
                assert share is None or f" {share.mean:.3f} [{share.low:.3f}, " in told


def test_tables_are_whole_and_pictures_have_a_name(rendered: Rendered) -> None:
    page = Page(rendered[1])
    assert len(page.captions) == len(page.tables)
    for rows in page.tables:
        assert len({len(row) for row in rows}) == 1
    assert all(a.get("scope") in ("row", "col") for tag, a in page.elements if tag == "th")
    svg = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert all(a["role"] == "img" and a["aria-label"] for a in svg)


def test_nothing_is_loaded_and_no_two_elements_share_an_id(rendered: Rendered) -> None:
    _, text = rendered
    elements = Page(text).elements
    assert not {"script", "link", "img", "image", "iframe", "object"} & {tag for tag, _ in elements}
    for _, attributes in elements:
        assert "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "://" not in text
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([\w-]+)', text)) == set(ids)


def test_the_same_document_gives_the_same_page() -> None:
    document = evaluation(tables=[table()])
    assert render(document) == render(Evaluation.model_validate_json(document.model_dump_json()))


HOSTILE = "<script>alert('x')</script>"


@pytest.mark.parametrize("name", [HOSTILE, "$a^b$", "_hidden", "忘却", 'a"onload="x', "bell\x07"])
def test_a_name_stays_a_name_everywhere(name: str) -> None:
    model = IDENTITY.model_copy(update={"id": name})
    text = render(
        evaluation(
            names=("full", "h2o", name),
            tasks=(name,),
            tables=[table(f"{name}-table")],
            model=model,
            command=name,
            machine={name: name},
        )
    )
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any("onload" in attributes for _, attributes in page.elements)
    assert any(row[0] == name for row in page.under(f"{name}, at ratio 0.1"))
    if name == HOSTILE:
        # In a picture: matplotlib's own escaping, and a name cut to what has room.
        assert "&lt;script&gt;alert('x')&lt;/script&gt;</text>" in text


METRICS = (
    "KL to the full cache, nats",
    "NLL, nats",
    "top-1 agreement with the full cache",
    "accuracy",
    "attention similarity",
)


def test_sizes_over_which_there_are_curves_have_a_heat_map_too() -> None:
    several = Page(render(evaluation())).pictures()
    assert several[:5] == [
        f"mathqa, 1-shot: {metric} over the size of the cache (ratio)" for metric in METRICS
    ]
    assert [label.split(" by ")[0] for label in several[5:]] == [
        "mathqa, 1-shot: KL to the full cache",
        *(
            f"mathqa, 1-shot, {policy}: Attention similarity"
            for policy in ("a2sf:0.5", "h2o", "window")
        ),
    ]
    text = render(evaluation(sizes=RATIOS[:1]))
    assert Page(text).pictures()[:5] == [
        f"mathqa, 1-shot: {metric} at ratio 0.1" for metric in METRICS
    ]
    assert len(Page(text).pictures()) == 8
    assert "Each metric at ratio 0.1, a dot for each policy" in text


def test_ratios_and_slots_never_share_an_axis() -> None:
    labels = Page(render(evaluation(sizes=(*RATIOS[:2], SLOTS[0])))).pictures()
    assert all("(ratio)" in label for label in labels[:5])
    assert all("at 16 slots" in label for label in labels[5:10])


def svg_of(text: str, label: str) -> str:
    (found,) = (svg for svg in re.findall(r"<svg.*?</svg>", text, re.S) if label in svg[:400])
    return found


def test_the_full_cache_is_a_reference_and_no_curve() -> None:
    drawn = svg_of(render(evaluation()), "accuracy over")
    assert "accuracy (higher is better)" in drawn
    assert "stroke-dasharray" in drawn
    assert ">full</text>" not in drawn
    without = render(evaluation(names=("window", "a2sf:0.5"), comparisons=()))
    assert "stroke-dasharray" not in svg_of(without, "accuracy over").replace("<defs>", "")
    kl = svg_of(render(evaluation()), "KL to the full cache, nats over")
    assert "KL to the full cache, nats (lower is better)" in kl
    labels = Page(render(evaluation(accuracy=False))).pictures()
    assert not any("accuracy" in label for label in labels)


@pytest.mark.parametrize("metric", ["accuracy", "NLL, nats"])
def test_the_line_of_the_full_cache_ends_before_the_names_of_curves(metric: str) -> None:
    drawn = svg_of(render(evaluation()), f"{metric} over")
    (line,) = re.findall(r'<path d="M [\d.]+ [\d.]+ +L ([\d.]+) [^>]*stroke-dasharray', drawn)
    names = re.findall(r'x="([\d.]+)"[^>]*>(?:h2o|window|a2sf:0.5)</text>', drawn)
    assert len(names) == 3
    assert all(float(line) < float(x) for x in names)


def test_every_line_has_a_name_except_settings_that_are_best_at_no_size() -> None:
    document = evaluation(names=NAMES, sizes=RATIOS, tables=[table()])
    best = {document.best_a2sf("mathqa, 1-shot", size).policy for size in RATIOS}  # type: ignore[union-attr]
    drawn = svg_of(render(document), "KL to the full cache, nats over")
    named = [t for t in re.findall(r">([^<]+)</text>", drawn) if t in {*NAMES, "mathqa"}]
    expected = {n for n in NAMES if not n.startswith("a2sf") and n != "full"} | best | {"mathqa"}
    assert len(best) < len([n for n in NAMES if n.startswith("a2sf")])
    assert sorted(named) == sorted(expected)


def test_a_dark_page_recolours_all_ink_lines_and_paper_of_its_pictures() -> None:
    text = render(evaluation(tables=[table()]))
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
        assert "#000000" not in used
    for colour in ("#222222", "#dddddd", "#ffffff"):
        assert f"stroke: {colour}" in text.split("</style>")[0]


def test_pictures_shrink_to_the_width_of_a_phone() -> None:
    text = render(evaluation(names=NAMES, sizes=RATIOS, tables=[table()]))
    drawn = re.findall(r"<svg[^>]*style=\"width: (\d+)px(?:; min-width: (\d+)px)?\"", text)
    assert len(drawn) > 8
    # A picture without a least width shrinks with the window.
    assert all(int(least or 0) <= 476 for _, least in drawn)


def test_on_a_phone_the_figures_of_a_table_may_take_several_lines() -> None:
    _, narrow = render(evaluation()).split("@media (max-width: 45rem)")
    narrow, _, _ = narrow.partition("@media print")
    assert "th, td { white-space: normal; }" in narrow
    # Words stay whole.
    assert "th[scope=row] { overflow-wrap: normal;" in narrow


def test_every_table_scrolls_and_shades_the_edge_beyond_which_it_continues() -> None:
    text = render(evaluation(tables=[table()]))
    assert text.count("<table") == text.count('<div class="wide"><table')
    (rule,) = re.findall(r"^\.wide \{[^}]*\}", text, re.M)
    assert "overflow-x: auto" in rule
    assert rule.count("local") == rule.count("var(--shade)") == 2


def test_the_conclusion_is_about_the_size_that_a_table_was_fitted_at() -> None:
    fitted = table().model_copy(update={"fitted_at": RATIOS[1]})
    assert "mathqa, 1-shot, ratio 0.2: " in render(evaluation(tables=[fitted]))
    unmeasured = table().model_copy(update={"fitted_at": SLOTS[0]})
    for tables in ([unmeasured], []):
        assert "mathqa, 1-shot, ratio 0.1: " in render(evaluation(tables=tables))


def test_the_page_begins_with_its_conclusion() -> None:
    document = evaluation(names=("full", "h2o", "a2sf:0.5"), tables=[table()])
    at = RATIOS[0]
    best = min((c for c in document.cells if c.size == at), key=lambda c: c.kl.mean)
    text = render(document)
    assert f"{best.policy} stays closest to the full cache" in text
    assert text.index("stays closest") < text.index("Some Processor")
    assert "only the full cache was run" in render(evaluation(names=("full",)))


def test_head_maps_show_the_table_the_best_a2sf_h2o_and_window_at_the_smallest_size() -> None:
    document = evaluation(names=NAMES, tables=[table(), table("other")])
    at = RATIOS[0]
    uniform = [c for c in document.cells if c.policy.startswith("a2sf") and c.size == at]
    best = document.best_a2sf("mathqa, 1-shot", at).policy  # type: ignore[union-attr]
    text = render(document)
    shown = [
        label.split(": Attention similarity by layer and KV head at ratio 0.1")[0]
        for label in Page(text).pictures()
        if "Attention similarity" in label
    ]
    assert best in {cell.policy for cell in uniform}
    assert shown == [f"mathqa, 1-shot, {name}" for name in ("mathqa", best, "h2o", "window")]
    drawn = svg_of(text, "mathqa, 1-shot, h2o: Attention similarity")
    assert ">h2o</text>" in drawn
    value = document.cell("mathqa, 1-shot", "h2o", at).similarity_by_head[1][0]  # type: ignore[union-attr]
    assert f">{value:.3f}</text>".replace(">0.", ">.") in drawn


def test_a_table_is_drawn_with_its_alphas_and_half_lives() -> None:
    policy = table().model_copy(update={"alpha": ((0.0, 1.0), (0.9, 0.5))})
    drawn = svg_of(render(evaluation(tables=[policy])), "mathqa: Alpha by layer")
    for text in ("0.9", "6.58", "inf"):
        assert f">{text}</" in drawn


def test_a_map_of_many_heads_is_coloured_and_not_printed() -> None:
    policy = table().model_copy(update={"alpha": ((0.875,) * 32,) * 32})
    drawn = svg_of(render(evaluation(tables=[policy])), "mathqa: Alpha by layer")
    assert "0.875" not in drawn


@pytest.mark.parametrize(
    ("metric", "mean", "p", "words"),
    [
        ("kl", -0.3, 0.001, "better (lower)"),
        ("kl", 0.3, 0.001, "worse (higher)"),
        ("nll", -0.3, 0.001, "better (lower)"),
        ("accuracy", 0.3, 0.001, "better (higher)"),
        ("similarity", -0.3, 0.001, "worse (lower)"),
        ("kl", -0.3, 0.02, "not significant"),  # .06 after the correction
    ],
)
def test_a_comparison_has_a_verdict_in_words(
    metric: Metric, mean: float, p: float, words: str
) -> None:
    document = evaluation()
    row = compared("mathqa, 1-shot", RATIOS[0], "a2sf:0.9", metric, mean, p)
    page = Page(render(document.model_copy(update={"comparisons": (row,)})))
    interval = f"{mean:+.4f} [{mean - 0.1:+.4f}, {mean + 0.1:+.4f}]"
    assert page.under("mathqa, 1-shot, at ratio 0.1: differences")[1] == (
        ["a2sf:0.9", "h2o", metric, interval, f"{p:.4f}", f"{3 * p:.4f}", words]
    )


def test_small_figures_keep_their_digits() -> None:
    document = evaluation()
    tiny = document.cells[1].model_copy(update={"kl": around(0.00042)})
    page = render(document.model_copy(update={"cells": (document.cells[0], tiny)}))
    assert "4.2e-04 [3.8e-04, 4.8e-04]" in page


def test_rounding_errors_are_shown_as_zero() -> None:
    document = evaluation()
    full = document.cells[0].model_copy(
        update={"kl": Estimate(mean=-9.5e-9, low=-1.6e-8, high=-1.4e-9)}
    )
    page = Page(render(document.model_copy(update={"cells": (full, *document.cells[1:])})))
    (row,) = (row for row in page.under("mathqa, 1-shot, at ratio 0.1") if row[0] == "full")
    assert row[2] == "0.0000 [0.0000, 0.0000]"


def test_comparisons_of_the_best_a2sf_and_of_tables_come_before_all_of_them() -> None:
    document = evaluation(tables=[table()])
    page = Page(render(document))
    caption = "mathqa, 1-shot: the KL of tables and of the best a2sf"
    expected = [
        [str(size), policy, "h2o"]
        for size in RATIOS[:3]
        for policy in (document.best_a2sf("mathqa, 1-shot", size).policy, "mathqa")  # type: ignore[union-attr]
    ]
    assert [row[:3] for row in page.under(caption)[1:]] == expected
    assert page.captions.index(caption) < page.captions.index(
        "mathqa, 1-shot, at ratio 0.1: differences"
    )
    assert caption not in Page(render(evaluation(names=("full", "window", "h2o")))).captions


def test_a_cell_without_a_policy_or_with_no_cost_leaves_the_pictures_whole() -> None:
    document = evaluation()
    nothing = Estimate(mean=0.0, low=0.0, high=0.0)
    cells = [cell.model_copy(update={"kl": nothing}) for cell in document.cells[:-1]]
    page = Page(render(document.model_copy(update={"cells": tuple(cells)})))
    assert len(page.pictures()) == 9


def test_the_head_and_the_foot_say_where_it_comes_from() -> None:
    text = render(evaluation(tables=[table()]))
    for said in (
        "2026-03-04 15:06 UTC",
        "13 min",
        "evaluate --dataset mathqa --ratios .1,.2",
        "Some Processor",
        "95 % intervals",
        "12345",
        "6789",
        "c" * 64,
        IDENTITY.fingerprint,
        "share of questions answered right",
    ):
        assert said in text


def test_a_large_evaluation_stays_a_page_that_can_be_mailed() -> None:
    identity = IDENTITY.model_copy(update={"num_layers": 8})
    document = evaluation(
        names=NAMES,
        sizes=RATIOS,
        tasks=("mathqa, 1-shot", "gsm8k", "recall"),
        tables=[table()],
        model=identity,
    )
    assert len(render(document).encode()) < 3_000_000


@given(st.lists(st.floats(0, 160), max_size=12))
def test_names_at_the_ends_of_lines_do_not_overlap_and_stay_beside_the_panel(
    ends: list[float],
) -> None:
    wanted = sorted(ends)
    places = spread(wanted, 160.0)
    assert all(b - a >= LABEL_GAP - 1e-9 for a, b in pairwise(places))
    assert all(-1e-9 <= place <= 160 + 1e-9 for place in places)
    if all(b - a >= LABEL_GAP for a, b in pairwise(wanted)):
        assert places == pytest.approx(wanted)


def test_names_of_lines_that_end_at_the_top_continue_downwards() -> None:
    assert spread([160.0, 160.0, 160.0], 160.0) == [138.0, 149.0, 160.0]
    # Elsewhere they are centred on the ends of their lines.
    assert spread([80.0, 80.0, 80.0], 160.0) == pytest.approx([69.0, 80.0, 91.0])
