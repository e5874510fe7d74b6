"""The first commands of a new user of the tuner."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tuner.fit
from a2sf import reference
from a2sf.tablefile import load_table
from tests.tuner.commands import ROOT, command, run
from tests.tuner.conftest import sums, write_rows
from tuner.data.datasets import REGISTRY, PublishedDataset
from tuner.settings import FitSettings


class Taken(Exception):
    """The settings of a fit that is not begun."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(settings: FitSettings) -> None:
        raise Taken(settings)

    monkeypatch.setattr(tuner.fit, "fit", take)


def test_without_arguments_the_commands_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["a2sf-tune"])
    from tuner.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    shown = "".join(capsys.readouterr())
    assert "Error" not in shown
    assert "Usage: a2sf-tune" in shown
    for name in ("fit", "evaluate", "budget", "report", "tables"):
        assert f"  {name} " in shown


def test_an_unknown_command_is_reported_with_the_nearest_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, line = run(monkeypatch, capsys, "evalute", "--dataset", "recall")
    assert code == 2
    assert "No such command 'evalute'" in line
    assert "'evaluate'" in line


def test_trials_bound_the_whole_search_the_best_uniform_setting_included(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model_dir: Path,
    small_data: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "sums.json"
    code, _, _ = run(
        monkeypatch,
        capsys,
        *("--dataset", "sums", "--data-dir", small_data, "--model", tiny_model_dir),
        *("--trials", 12, "--examples", 2, "--holdout", 9, "--length", 128, "--out", out),
    )
    assert code == 0
    stages = {stage.name: stage.trials for stage in load_table(out).search.stages}
    assert stages["uniform"] == 6
    assert 6 < sum(stages.values()) <= 12


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize(
    ("flags", "out"),
    [
        (("--dataset", "mathqa"), "tables/mathqa-0.2.json"),
        (("--dataset", "somewhere/mine.jsonl"), "tables/mine.jsonl-0.2.json"),
        (("--dataset", "somewhere/mine.txt", "--budget", 64), "tables/mine.txt-b64.json"),
        (("--dataset", "recall, state"), "tables/recall-state-0.2.json"),
    ],
)
def test_without_out_the_table_and_the_study_are_in_tables(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flags: tuple[object, ...],
    out: str,
) -> None:
    from tuner.cli import run as run_cli

    monkeypatch.chdir(tmp_path)
    with pytest.raises(Taken) as caught:
        run_cli(["fit", *map(str, flags)])
    (settings,) = caught.value.args
    assert str(settings.out) == out
    assert (settings.journal.parent, settings.journal.suffix) == (Path("tables"), ".journal")
    assert settings.out.parent.is_dir()
    assert out in settings.plan
    assert str(settings.journal) in settings.plan


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize(
    ("out", "name", "journal"),
    [
        ("x.json", "x", "x.journal"),
        ("x-0.2.json", "x-0.2", "x-0.2.journal"),
        ("x-0.2", "x-0.2", "x-0.2.journal"),
        ("x.journal", "x.journal", "x.journal.journal"),
    ],
)
def test_tables_of_several_names_have_a_study_each(
    tmp_path: Path, out: str, name: str, journal: str
) -> None:
    from tuner.cli import run as run_cli

    with pytest.raises(Taken) as caught:
        run_cli(["fit", "--dataset", "recall", "--out", str(tmp_path / out)])
    (settings,) = caught.value.args
    assert (settings.name, settings.study, settings.journal) == (name, name, tmp_path / journal)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mathqq", "dataset 'mathqq' not found; did you mean mathqa? Known names are mathqa, open"),
        ("sum", "dataset 'sum' not found; did you mean sums? Known"),
        ("data/mine.jsonl", "dataset 'data/mine.jsonl' not found. Known names are mathqa"),
        ("zzz", "dataset 'zzz' not found. Known names are mathqa"),
    ],
)
def test_an_unknown_dataset_is_reported_with_the_nearest_and_all_known_names(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_data: Path,
    tmp_path: Path,
    given: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--dataset", given, "--data-dir", small_data)
    for name in ("fit", "evaluate"):
        code, out, line = run(monkeypatch, capsys, name, *flags)
        assert (code, out) == (2, "")
        assert message in line
        assert f", and sums in {small_data}; looked for {small_data / given}" in line


def test_the_help_and_the_guide_say_which_data_sets_need_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, told, _ = run(monkeypatch, capsys, "fit", "--help")
    told = " ".join(told.split())
    assert "recall, state, arith or copy, which are generated and need no data" in told
    assert "DIR/NAME/calibration.jsonl" in told
    generated, public = "Generated", "Public"
    guide = {
        kind: line
        for line in (ROOT / "docs" / "tuner.md").read_text().splitlines()
        for kind in (generated, public)
        if line.startswith(f"- **{kind}**")
    }
    for name, entry in REGISTRY.items():
        if isinstance(entry, PublishedDataset):
            assert f"`{name}`" in guide[public]
        elif "_" not in name:  # the others are forms of recall and state
            assert f"`{name}`" in guide[generated]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stages", "polsh"), "each at most once; did you mean polish?"),
        (("--policies", "tova_per_hed"), "alpha table; did you mean tova_per_head?"),
        (("--policies", "mathq"), "alpha table; did you mean mathqa?"),
    ],
)
def test_other_unknown_names_are_reported_with_the_nearest_too(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    flags: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "fit" if flags[0] == "--stages" else "evaluate"
    code, _, line = run(monkeypatch, capsys, name, "--dataset", "recall", *flags)
    assert code == 2
    assert message in line


def test_a_shipped_table_is_shown_and_reported_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shipped = load_table(reference.path() / "tables" / "mathqa.json")
    code, out, _ = run(monkeypatch, capsys, "tables", "show", "mathqa")
    assert code == 0
    assert out.startswith(f"mathqa  (schema 3, sha256 {shipped.sha256[:16]}")
    page = tmp_path / "pages" / "mathqa.html"
    code, out, _ = run(monkeypatch, capsys, "report", "mathqa", "--html", page)
    assert (code, out) == (0, f"Wrote {page}.\n")
    assert page.is_file()


def test_a_missing_table_is_reported_with_the_shipped_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for words in (("tables", "show", "mathqq"), ("report", "mathqq", "--html", tmp_path / "x")):
        code, _, line = run(monkeypatch, capsys, *words)
        assert code == 2
        assert line == (
            "error: alpha table mathqq: there is no such file, and none is shipped under this "
            "name; shipped: mathqa; did you mean mathqa?"
        )


def test_the_split_of_a_single_file_is_printed_before_the_fit(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "mine.jsonl", sums(0, 250))
    out = tmp_path / "mine.json"
    done = subprocess.run(
        command(
            *("--dataset", data, "--model", tiny_model_dir, "--out", out, "--trials", 1),
            *("--examples", 2, "--holdout", 9, "--length", 128),
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    split = (
        "Data: mine.jsonl holds questions or prompts with answers; calibration: all but the last "
        "20% (200 rows), validation: the last 20% (50 rows). The search uses calibration, the "
        "proof validation."
    )
    assert lines.index(split) < next(
        i for i, line in enumerate(lines) if line.startswith("stage 1")
    )
    table = load_table(out)
    assert (table.calibration.dataset, table.evidence.dataset) == ("mine.jsonl", "mine.jsonl")
    assert json.loads(out.read_text())["calibration"]["dataset"] == "mine.jsonl"
