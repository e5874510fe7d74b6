"""The command evaluate: its output, its files, and its errors."""

from pathlib import Path

import pytest

from tests.tuner.commands import run
from tuner.evaluation.results import Evaluation


def test_evaluate_prints_every_figure_and_writes_json_and_html(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_evaluation: list[object],
    tmp_path: Path,
) -> None:
    out_json, out_html = tmp_path / "e.json", tmp_path / "e.html"
    code, out, _ = run(
        monkeypatch,
        capsys,
        *(*small_evaluation, "--ratios", ".2,.4", "--shots", "0,1"),
        *("--json", out_json, "--html", out_html),
    )
    assert code == 0
    found = Evaluation.model_validate_json(out_json.read_text(encoding="utf-8"))
    assert [task.name for task in found.tasks] == ["sums, 0-shot", "sums, 1-shot"]
    assert len(found.cells) == 2 * (1 + 2 * 2)
    for cell in found.cells:
        for figure in (cell.kl, cell.nll, cell.top1, cell.accuracy, cell.similarity):
            assert figure is not None
            mean, low, high = (round(x, 4) + 0.0 for x in (figure.mean, figure.low, figure.high))
            assert f"{mean:.4f} [{low:.4f}, {high:.4f}]" in out
    assert "-0.0000" not in out
    assert "a2sf:.9 minus h2o" in out
    assert str(tmp_path) not in found.command
    assert found.command.startswith("python -m tuner evaluate --dataset sums")
    page = out_html.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") or page.startswith("<!doctype html>")
    assert str(tmp_path) not in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ratios", "0"), "--ratios: '0'; accepted: numbers above 0 and below 1"),
        (("--ratios", ".2,.2"), "--ratios: '.2'; accepted: numbers above 0 and below 1, each once"),
        (("--slots", "1.5"), "--slots: '1.5'; accepted: whole numbers from 1"),
        (("--shots", "-1"), "--shots: '-1'; accepted: whole numbers from 0"),
        (("--split", "test"), "--split: 'test'; accepted: validation, calibration"),
        (("--policies", "snapkv"), "--policies: 'snapkv'; accepted: full; window"),
        (("--dataset", "mathq"), "dataset 'mathq' not found"),
        (("--examples", 999), "lower --examples"),
        (("--json", "/proc/x/y.json"), "--json: /proc/x/y.json cannot be written"),
        (("--html", "/"), "--html: / is a directory"),
    ],
)
def test_evaluate_reports_mistakes_of_the_user_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_evaluation: list[object],
    flags: tuple[object, ...],
    message: str,
) -> None:
    code, out, line = run(monkeypatch, capsys, *small_evaluation, *flags)
    assert (code, out) == (2, "")
    assert message in line
