"""The command line: what is printed, what is written, and failures in one line."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import tuner.fit
from a2sf.schema import AlphaTable
from a2sf.tablefile import load_table
from tests.broken import BROKEN
from tests.tuner.commands import ROOT, command, run
from tests.tuner.conftest import MakeSettings, finished
from tests.tuner.postgres import postgresql
from tuner.evaluation.results import Evaluation
from tuner.study.ledger import Pace


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
    assert ("\nNo better than uniform: " in out) == (table.evidence.verdict != "better")
    assert f"--model {tiny_model_dir} --tables {tmp_path} --default-table sums" in out
    assert (tmp_path / "sums.journal").exists()


def test_tables_show_prints_what_the_file_says(
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
    ("flags", "told"),
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
def test_what_the_user_can_mend_is_told_in_the_last_line_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_fit: list[object],
    tmp_path: Path,
    flags: tuple[object, ...],
    told: str,
) -> None:
    code, out, line = run(monkeypatch, capsys, *small_fit, *flags)
    assert code == 2
    assert out == ""
    assert line.lower().startswith("error: ")
    assert told in line
    assert not (tmp_path / "sums.json").exists()


def test_a_database_that_is_away_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    address = "postgresql://somebody:secret@127.0.0.1:1/studies"
    code, _, line = run(monkeypatch, capsys, *small_fit, "--storage", address)
    assert code == os.EX_UNAVAILABLE
    assert "the 'postgresql' storage cannot be reached" in line
    assert "secret" not in line


def test_an_out_that_cannot_be_written_is_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    monkeypatch.setattr(tuner.fit, "fit", lambda _: pytest.fail("work was begun"))
    code, out, line = run(monkeypatch, capsys, *small_fit, "--out", "/proc/nowhere/x.json")
    assert (code, out) == (2, "")
    assert line == (
        "error: --out: /proc/nowhere/x.json cannot be written (No such file or directory); give a "
        "file in another directory"
    )


def test_a_study_made_for_something_else_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    assert run(monkeypatch, capsys, *small_fit)[0] == 0
    code, _, line = run(monkeypatch, capsys, *small_fit, "--budget-ratio", 0.3)
    assert code == 2
    assert "made for another fit: budget_ratio is 0.2 there and 0.3 here" in line


@pytest.mark.parametrize("away", ["journal", "directory"])
def test_a_storage_that_goes_away_in_the_middle_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_fit: list[object],
    tmp_path: Path,
    away: str,
) -> None:
    monkeypatch.setattr("tuner.study.ledger.Pace", partial(Pace, patience=0.5))
    honest = tuner.evaluation.objective.Objective.cost
    place = tmp_path / "volume"
    place.mkdir()

    def cost(
        self: tuner.evaluation.objective.Objective, *arguments: object
    ) -> tuner.evaluation.objective.Cost:
        if away == "journal":
            (place / "sums.journal").unlink(missing_ok=True)
        elif place.exists():
            place.rename(tmp_path / "unmounted")
        return honest(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tuner.evaluation.objective.Objective, "cost", cost)
    code, out, line = run(monkeypatch, capsys, *small_fit, "--out", place / "sums.json")
    assert (code, out) == (os.EX_UNAVAILABLE, "")
    assert line == (
        "error: the storage of study 'sums' has not answered for 0.5 s; the study is kept: run "
        "the same command again once the storage is back"
    )


@pytest.mark.slow
def test_a_database_that_goes_away_in_the_middle_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    monkeypatch.setattr("tuner.study.ledger.Pace", partial(Pace, patience=1.0))
    honest = tuner.evaluation.objective.Objective.cost
    with postgresql() as server:
        address = server.database("gone")

        def cost(
            self: tuner.evaluation.objective.Objective, *arguments: object
        ) -> tuner.evaluation.objective.Cost:
            server.stop()
            return honest(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(tuner.evaluation.objective.Objective, "cost", cost)
        code, out, line = run(monkeypatch, capsys, *small_fit, "--storage", address)
        server.start()
    assert (code, out) == (os.EX_UNAVAILABLE, "")
    assert "'sums' has not answered for 1 s; the study is kept" in line


def test_a_grpc_storage_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    code, _, line = run(monkeypatch, capsys, *small_fit, "--storage", "grpc://127.0.0.1:13000")
    assert code == 2
    assert "the 'grpc' storage cannot be opened" in line


def test_without_the_extra_it_says_what_to_install(
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


def test_an_interruption_is_one_line_and_keeps_the_study(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_fit: list[object],
    tmp_path: Path,
) -> None:
    begun: list[object] = []
    honest = tuner.evaluation.objective.Objective.cost

    def cost(
        self: tuner.evaluation.objective.Objective, *arguments: object
    ) -> tuner.evaluation.objective.Cost:
        begun.append(arguments)
        if len(begun) == 5:
            signal.raise_signal(signal.SIGINT)
        return honest(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tuner.evaluation.objective.Objective, "cost", cost)
    code, _, line = run(monkeypatch, capsys, *small_fit, "--stages", "layers")
    assert code == 130
    assert line == "interrupted; what is measured is kept: run the same command to go on"
    assert not (tmp_path / "sums.json").exists()
    code, _, _ = run(monkeypatch, capsys, *small_fit, "--stages", "layers")
    assert code == 0
    assert load_table(tmp_path / "sums.json").search.trials == 3
    # The second run takes up what was interrupted, and begins nothing else twice.
    assert begun[5] == begun[4]
    assert len(set(begun)) == len(begun) - 1


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda text: text[: len(text) // 2], "not whole JSON, perhaps cut short"),
        (lambda text: text.replace('"schema_version": 3', '"schema_version": 99'), "is 99"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "changed or damaged"),
        (lambda _: None, "there is no such file"),
    ],
)
def test_a_file_that_is_no_whole_table_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: MakeSettings,
    tmp_path: Path,
    spoil: object,
    told: str,
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
    assert told in line


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_of_the_readme_fits_the_packaged_model_to_mathqa(
    data_dir: Path, tmp_path: Path
) -> None:
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
    assert (table.search.trials, table.calibration.examples) == (2, 4)
    assert table.evidence.baselines["random"].mean > table.evidence.baselines["uniform"].mean


def fit_under(name: str, small_fit: list[object], tmp_path: Path) -> subprocess.Popen[str]:
    """A process that fits the small data with eighty trials, its files by this name."""
    return subprocess.Popen(
        command(
            *(*small_fit, "--trials", 80, "--name", "sums"),
            *("--out", tmp_path / f"{name}.json"),
        ),
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], file: Path) -> AlphaTable:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return load_table(file)


def searched(journal: Path) -> int:
    """Trials of a search: all that was measured but the proof."""
    return sum(not batch.startswith("proof ") for batch, _ in finished(journal))


def wait_for_trials(process: subprocess.Popen[str], journal: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(finished(journal)) < count:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_fit_goes_on_where_it_was(small_fit: list[object], tmp_path: Path) -> None:
    journal = tmp_path / "killed.journal"
    first = fit_under("killed", small_fit, tmp_path)
    # Killed somewhere among the tables, after the 40 uniform ones.
    wait_for_trials(first, journal, 55)
    first.kill()
    first.communicate()
    kept = finished(journal)
    assert not (tmp_path / "killed.json").exists()

    resumed = wait_for(fit_under("killed", small_fit, tmp_path), tmp_path / "killed.json")
    whole = wait_for(fit_under("whole", small_fit, tmp_path), tmp_path / "whole.json")
    assert finished(journal)[: len(kept)] == kept
    assert len(set(finished(journal))) == len(finished(journal))
    # All stages together: uniform, the tables', and the layers that they are compared with.
    assert searched(journal) == searched(tmp_path / "whole.journal") == 80
    assert resumed.search.trials == whole.search.trials > 20
    assert (resumed.policy, resumed.evidence) == (whole.policy, whole.evidence)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_workers_one_of_them_killed_find_what_one_finds(
    small_fit: list[object], tmp_path: Path
) -> None:
    journal = tmp_path / "shared.journal"
    workers = [fit_under("shared", small_fit, tmp_path) for _ in range(3)]
    wait_for_trials(workers[0], journal, 30)
    workers[0].kill()
    workers[0].communicate()
    tables = [wait_for(worker, tmp_path / "shared.json") for worker in workers[1:]]
    alone = wait_for(fit_under("alone", small_fit, tmp_path), tmp_path / "alone.json")
    measured = finished(journal)
    assert len(set(measured)) == len(measured)
    assert searched(journal) == 80
    assert sorted(measured) == sorted(finished(tmp_path / "alone.journal"))
    for table in tables:
        assert table.search.trials == alone.search.trials > 20
        assert (table.policy, table.evidence) == (alone.policy, alone.evidence)


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
    ("flags", "told"),
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
def test_evaluate_tells_what_the_user_can_mend(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_evaluation: list[object],
    flags: tuple[object, ...],
    told: str,
) -> None:
    code, out, line = run(monkeypatch, capsys, *small_evaluation, *flags)
    assert (code, out) == (2, "")
    assert told in line


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
def test_a_broken_checkpoint_is_told_in_one_line(
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
    assert BROKEN[name].told in last
