"""Pictures that are files: each has a title, a heading, a dark form, and shows the kept figures."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import RESULTS
from benchmarks.findings import FIGURES
from benchmarks.pictures import standalone, study_picture
from tests.tuner.pages import RATIOS, evaluation, table
from tuner.report.pictures import curves, metrics_of
from tuner.report.styles import MORE_TABLES

PICTURES = sorted(RESULTS.glob("*.svg"))
STUDIES = {study["name"]: study for study in json.loads(FIGURES.read_text())["studies"]}
SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_file_has_a_title_a_heading_and_a_dark_form(
    path: Path,
) -> None:
    picture = path.read_text()
    first = ElementTree.fromstring(picture)[0]
    assert first.tag == f"{SVG}title"
    assert first.text in texts(picture)
    assert "prefers-color-scheme: dark" in picture
    assert 'fill="white"' not in picture


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_file_is_linked_from_a_page(path: Path) -> None:
    pages = [RESULTS.parent / "FINDINGS.md", RESULTS.parents[1] / "docs" / "performance.md"]
    assert any(f"results/{path.name})" in page.read_text() for page in pages)


@pytest.mark.parametrize("name", ["ratios", "transfer-budget"])
def test_a_picture_file_shows_the_stored_figures(name: str) -> None:
    assert texts((RESULTS / f"{name}.svg").read_text()) == texts(study_picture(STUDIES[name]))


def test_any_label_becomes_the_title() -> None:
    picture = standalone('<svg role="img" aria-label="a &lt; b &amp; &quot;c&quot;"><g/></svg>')
    assert ElementTree.fromstring(picture)[0].text == 'a < b & "c"'


def test_no_panel_is_empty_and_tables_have_different_colours() -> None:
    document = evaluation(tables=[table(), table("other"), table("third")])
    task = document.tasks[0].name
    metrics = metrics_of(document, task)
    assert len(metrics) == 5
    drawn = curves(document, task, RATIOS[:3], metrics, label="label", salt="salt")
    # The paper of each panel, as wide as the panel.
    papers = re.findall(r'd="M ([\d.]+) [\d.]+  L ([\d.]+) [^"]*z " style="fill: none"', drawn)
    widths = [float(right) - float(left) for left, right in papers if float(left) > 0]
    assert len(widths) == 5
    assert widths[4] > 1.8 * widths[0]
    for colour in ("#009e73", *MORE_TABLES[:2]):
        assert f"stroke: {colour}" in drawn
