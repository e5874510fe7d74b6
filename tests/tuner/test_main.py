"""The command line: what is printed, what is written, and failures in one line."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tuner.fit
from a2sf.tablefile import load_table
from tests.broken import BROKEN
from tests.tuner.commands import ROOT, command, run
from tests.tuner.conftest import MakeSettings


def test_bare_options_fit_and_print_figures_verdict_and_how_to_serve(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_fit: list[object],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    code, out, _ = run(monkeypatch, capsys, *small_fit)
    table = load_table(tmp_path / "sums.json")
    assert code == 0
    for name in ("fitted table", "uniform", "h2o", "window", "tova_per_head", "random"):
        assert name in out
    uniform = table.evidence.baselines["uniform"]
    assert f"{uniform.mean:.4f} [{uniform.low:.4f}, {uniform.high:.4f}]" in out
    assert ("\nBetter: " in out) == (table.evidence.verdict == "better")
    assert ("\nNot shown to be better than uniform: " in out) == (
        table.evidence.verdict != "better"
    )
    assert f"--model {tiny_model_dir} --tables {tmp_path} --default-table sums" in out
    assert (tmp_path / "sums.journal").exists()
    assert "run the same command again with more --trials to continue." in out
    # The data has more sequences than the four that were asked for.
    assert "\nToo few examples: 4 held-out examples" in out
    assert "What helps: --holdout 16 or more.\n" in out


def test_a_table_whose_file_does_not_end_in_json_is_renamed_to_be_served(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_fit: list[object],
    tmp_path: Path,
) -> None:
    code, out, _ = run(monkeypatch, capsys, *small_fit, "--out", tmp_path / "sums-0.2")
    assert code == 0
    assert "A server reads only files that end in .json." in out
    rename, serve = out.splitlines()[-1].split(" && ")
    assert shlex.split(rename) == ["mv", f"{tmp_path}/sums-0.2", f"{tmp_path}/sums-0.2.json"]
    assert serve.endswith(f"--tables {tmp_path} --default-table sums-0.2")


def test_tables_show_prints_the_contents_of_the_file(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_fit: list[object],
    tmp_path: Path,
) -> None:
    run(monkeypatch, capsys, "fit", *small_fit, "--name", "mine", "--keep-table")
    table = load_table(tmp_path / "sums.json")
    code, out, _ = run(monkeypatch, capsys, "tables", "show", tmp_path / "sums.json")
    assert code == 0
    assert out.startswith(f"mine  (schema 3, sha256 {table.sha256[:16]}")
    assert f"{table.calibration.examples} examples of sums (calibration)" in out
    assert "budget 0.2 of the length" in out
    assert table.model.architecture in out
    assert "table minus uniform" in out
    # Not a terminal: digits without colours.
    assert "\x1b" not in out
    rows = [line.split() for line in out.splitlines() if line[:5].strip().isdigit()]
    # Slots in multiples of the budget, where they differ, end in an x.
    shown = [[float(cell) for cell in row[1:] if not cell.endswith("x")] for row in rows]
    assert shown == [[pytest.approx(a, rel=1e-3) for a in row] for row in table.policy.alpha]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", 0), "--budget: 0; accepted: 1 or more"),
        (("--budget-ratio", 1.5), "--budget-ratio: 1.5; accepted: above 0 and below 1"),
        (("--budget-ratio", "nan"), "--budget-ratio: nan; accepted: above 0 and below 1"),
        (("--budget", 9, "--budget-ratio", 0.5), "at most one of --budget and --budget-ratio"),
        (("--trials", 0), "--trials: 0; accepted: 1 or more"),
        (("--examples", 1), "--examples: 1; accepted: 2 or more"),
        (("--holdout", 1), "--holdout: 1; accepted: 2 or more"),
        (("--seed", -1), "--seed: -1; accepted: 0 to 2147483647"),
        (("--prefill-chunk", -1), "--prefill-chunk: -1; accepted: 0 or more"),
        (("--name", "../x"), "--name: '../x'; accepted: up to 100 letters"),
        (("--out", "/proc/nowhere/all.json"), "--out: /proc/nowhere/all.json cannot be written"),
        (("--dataset", "mathq"), "dataset 'mathq' not found"),
        (("--model", "/nowhere/model"), "model '/nowhere/model'"),
        (("--length", 1000), "length: 1000 tokens"),
        (("--budget", 500), "nothing would be evicted"),
        (("--storage", "what://ever"), "'what' storage cannot be opened"),
        (("--trials", "many"), "'--trials'"),
        (("--minutes", -1), "--minutes: -1; accepted: above 0, or 0 for no limit"),
        (("--stages", "layers,anneal"), "--stages: 'anneal'; accepted: sensitivity, alphas, slots"),
        (("--stages", "heads,heads"), "'heads'; accepted: sensitivity, alphas, slots"),
        (("--device", "tpu"), "device: 'tpu'"),
    ],
)
def test_mistakes_of_the_user_are_reported_in_the_last_line_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_fit: list[object],
    tmp_path: Path,
    flags: tuple[object, ...],
    message: str,
) -> None:
    code, out, line = run(monkeypatch, capsys, *small_fit, *flags)
    assert code == 2
    assert out == ""
    assert line.lower().startswith("error: ")
    assert message in line
    assert not (tmp_path / "sums.json").exists()


def test_an_unwritable_out_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    monkeypatch.setattr(tuner.fit, "fit", lambda _: pytest.fail("work was begun"))
    code, out, line = run(monkeypatch, capsys, *small_fit, "--out", "/proc/nowhere/x.json")
    assert (code, out) == (2, "")
    assert line == (
        "error: --out: /proc/nowhere/x.json cannot be written (No such file or directory); give a "
        "file in another directory"
    )


def test_without_the_extra_the_error_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("optuna", "tuner")]:
        if name not in ("tuner", "tuner.__main__", "tuner.interrupt"):
            monkeypatch.delitem(sys.modules, name)
            # Importing again would leave the new module in the package for later tests.
            package, _, child = name.rpartition(".")
            if package == "tuner":
                monkeypatch.setattr(tuner, child, getattr(tuner, child))
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, line = run(monkeypatch, capsys, *small_fit)
    assert code == 2
    assert line.endswith("the tuner is an extra: pip install 'a2sf-serve[tune]'")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "not whole JSON, perhaps cut short"),
        (lambda text: text.replace('"schema_version": 3', '"schema_version": 99'), "is 99"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "changed or damaged"),
        (lambda _: None, "there is no such file"),
    ],
)
def test_a_damaged_table_file_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: MakeSettings,
    tmp_path: Path,
    spoil: object,
    message: str,
) -> None:
    from a2sf.tablefile import save_table

    path = tmp_path / "sums.json"
    save_table(tuner.fit.fit(settings(trials=0)).table, path)
    capsys.readouterr()
    spoiled = spoil(path.read_text(encoding="utf-8"))  # type: ignore[operator]
    if spoiled is None:
        path.unlink()
    else:
        path.write_text(spoiled, encoding="utf-8")
    code, out, line = run(monkeypatch, capsys, "tables", "show", path)
    assert (code, out) == (2, "")
    assert line.startswith(f"error: alpha table {path}: ")
    assert message in line


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_packaged_model_can_be_fitted_to_mathqa(data_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(
            "--dataset", "mathqa", "--trials", 4, "--examples", 4, "--out", tmp_path / "m.json"
        ),
        cwd=ROOT,
        env={**os.environ, "A2SF_DATA_DIR": str(data_dir)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = load_table(tmp_path / "m.json")
    assert table.model.id == "reference"
    assert (table.search.trials, table.calibration.examples) == (4, 4)
    assert table.evidence.baselines["random"].mean > table.evidence.baselines["uniform"].mean


@pytest.mark.parametrize("command", ["fit", "evaluate"])
@pytest.mark.parametrize(
    "name",
    [
        "quantised by awq",
        "biases without attention_bias",
        "a weight of another shape",
        "a size that is a word",
        "a tokenizer of an unknown kind",
    ],
)
def test_a_broken_checkpoint_is_reported_in_one_line(
    name: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model_dir: Path,
    small_data: Path,
    tmp_path: Path,
) -> None:
    checkpoint = Path(shutil.copytree(tiny_model_dir, tmp_path / "checkpoint"))
    BROKEN[name].change(checkpoint)
    said = ("--dataset", "sums", "--data-dir", small_data, "--model", checkpoint)
    wanted = {"fit": ("--out", tmp_path / "t.json"), "evaluate": ("--ratios", ".5")}[command]
    code, out, last = run(monkeypatch, capsys, command, *said, *wanted)
    assert (code, out) == (2, "")
    assert last.startswith("error: ")
    assert BROKEN[name].message in last
