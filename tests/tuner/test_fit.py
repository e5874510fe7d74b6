"""The whole fit with a tiny model, and the verdict."""

import json
import os
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tuner.fit
from a2sf.errors import InvalidArgument
from a2sf.model import dtypes
from a2sf.model.loader import LoadedModel
from a2sf.offline.teacher_forcing import Example
from a2sf.schema import Evidence, UniformSetting
from a2sf.tablefile import load_table, save_table
from tests.tuner.conftest import MakeSettings, finished, sums, write_rows
from tests.tuner.planted import Clock
from tuner.evaluation import objective
from tuner.fit import fit
from tuner.proof import judge
from tuner.report.sentences import is_uniform
from tuner.report.terminal import print_outcome
from tuner.search.stages import PER_LAYER_TIME_SHARE, SearchResult, search
from tuner.search.trials import Trials

SETTING = UniformSetting(alpha=0.9, recent_share=0.25, sinks=4)


def test_a_fit_writes_a_table_that_its_model_accepts(
    settings: MakeSettings, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    outcome = fit(settings())
    save_table(outcome.table, tmp_path / "sums.json")
    table = load_table(tmp_path / "sums.json", tiny_model.identity)
    assert table == outcome.table
    assert table.policy.budget_ratio == 0.2
    assert (table.calibration.dataset, table.calibration.examples) == ("sums", 2)
    assert (table.evidence.split, table.evidence.examples) == ("validation", 4)
    assert set(table.evidence.paired) == (
        {"uniform", "h2o", "window", "tova_per_head", "random"}
        | {"pyramid", "pyramid a2sf", "adakv", "adakv a2sf"}
    )
    assert table.evidence.lost_nll is not None
    assert table.evidence.lost_nll.mean == pytest.approx(
        outcome.nll["table"].mean - outcome.full_nll.mean
    )
    assert (
        table.evidence.baselines.keys()
        == table.evidence.paired.keys()
        == outcome.nll.keys() - {"table"}
    )
    assert (table.search.trials, table.search.storage) == (6, "journal")
    assert all(value.mean > 0 for value in table.evidence.baselines.values())
    stages = {stage.name: stage for stage in table.search.stages}
    assert list(stages) == ["uniform", "layers", "heads"]
    assert stages["layers"].trials + stages["heads"].trials == 3 == stages["uniform"].trials
    assert stages["uniform"].paired.mean == 0
    assert stages["uniform"].held_out == table.evidence.baselines["uniform"]
    assert stages["heads"].held_out == table.evidence.table
    assert stages["heads"].calibration <= stages["uniform"].calibration
    assert all(stage.evaluations > 0 < stage.seconds for stage in stages.values() if stage.trials)


def test_a_fit_by_head_is_compared_with_the_best_by_layer(settings: MakeSettings) -> None:
    outcome = fit(settings(stages=("sensitivity", "alphas"), trials=20))
    assert list(outcome.table.evidence.baselines)[-1] == "per layer"
    assert [stage.name for stage in outcome.table.search.stages] == [
        "uniform",
        "sensitivity",
        "per layer",
        "alphas",
    ]
    by_name = {stage.name: stage for stage in outcome.table.search.stages}
    assert by_name["per layer"].trials > 0
    assert by_name["per layer"].held_out == outcome.table.evidence.baselines["per layer"]
    assert outcome.table.search.trials == sum(stage.trials for stage in by_name.values()) <= 20


def test_the_baseline_by_layers_leaves_most_of_the_time_to_the_table(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: dict[str, float] = {}
    begin = Trials.stage

    def noted(self: Trials, name: str, trials: int, share: float = 1.0) -> Any:
        shares[name] = share
        return begin(self, name, trials, share)

    monkeypatch.setattr(Trials, "stage", noted)
    fit(settings(stages=("sensitivity", "alphas"), trials=20))
    assert shares["per layer"] == PER_LAYER_TIME_SHARE < 0.5
    assert shares["alphas"] == 1


@pytest.mark.parametrize(
    ("trials", "compared", "note"),
    [
        (4, False, "No setting by layers was measured: more --trials or --minutes would"),
        (5, True, "The search for the best setting by layers ended after 1 trial: more --trials"),
    ],
)
def test_a_shortened_search_by_layers_is_noted(
    settings: MakeSettings, trials: int, compared: bool, note: str
) -> None:
    outcome = fit(settings(stages=("sensitivity", "alphas"), trials=trials))
    assert ("per layer" in outcome.table.evidence.baselines) == compared
    assert sum(line.startswith(note) for line in outcome.notes) == 1


def test_a_repeated_fit_reuses_its_trials_and_gives_the_same_table(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(settings()).table
    monkeypatch.setattr(
        tuner.evaluation.objective.teacher_forcing,
        "predictions",
        lambda *_, **__: pytest.fail("something was measured"),
    )
    again = fit(settings()).table
    assert (again.policy, again.evidence) == (first.policy, first.evidence)


def test_a_journal_cut_in_its_last_line_costs_that_record_alone(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = fit(settings()).table
    journal = tmp_path / "sums.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    # The records by which a trial is finished; after one of them the fit is as if killed.
    ends = [at for at, line in enumerate(lines) if json.loads(line).get("state") in (1, 2)]
    cut = ends[3]
    whole = b"".join([*lines[:cut], lines[cut][: len(lines[cut]) // 2]])
    assert whole.count(b'"pid":%d' % os.getpid()) >= 4
    # The process that wrote it is gone.
    journal.write_bytes(whole.replace(b'"pid":%d' % os.getpid(), b'"pid":1'))
    kept = finished(journal)
    assert len(kept) == 3
    again = fit(settings()).table
    measured = finished(journal)
    assert measured[:3] == kept
    assert len(set(measured)) == len(measured) == len(ends)
    assert (again.policy, again.evidence) == (first.policy, first.evidence)


def test_a_study_is_measured_in_one_dtype_by_all_workers(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(settings(dtype="auto"))
    monkeypatch.setattr(dtypes, "bfloat16_unit", lambda: ("AMX-BF16", ""))
    monkeypatch.setattr(dtypes, "bfloat16_speedups", lambda _: {16: 2.0, 128: 8.0})
    with pytest.raises(InvalidArgument) as caught:
        fit(settings(dtype="auto"))
    assert str(caught.value) == (
        "study: 'sums' in this storage was made for another fit: dtype is 'float32' there and "
        "'bfloat16' here, because with AMX-BF16, bfloat16 is at least 2.00 times as fast here; "
        "give --dtype float32, or another --study or --out"
    )
    # What the sentence says helps.
    monkeypatch.setattr(
        tuner.evaluation.objective.teacher_forcing,
        "predictions",
        lambda *_, **__: pytest.fail("something was measured"),
    )
    fit(settings(dtype="float32"))


def test_the_time_ends_a_fit_with_a_verdict_on_fewer_held_out_examples(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    honest = tuner.evaluation.objective.Objective._pass

    def second(self: Any, rows: Any) -> Any:
        clock.now += 0.1 * len(rows)
        return honest(self, rows)

    monkeypatch.setattr(tuner.evaluation.objective.Objective, "_pass", second)
    outcome = fit(settings(trials=5000, minutes=0.5, holdout=60))
    assert 8 <= outcome.table.evidence.examples < 60
    assert clock.now < 30 + 1
    assert outcome.limits == ("--minutes",)
    text = StringIO()
    print_outcome(
        Console(file=text), outcome, model="m", out=Path("t.json"), study_kept="'sums' in t.journal"
    )
    assert "run the same command again with more --minutes to continue." in text.getvalue()
    assert any("The proof uses" in note for note in outcome.notes)
    assert outcome.remedy == "more --minutes"
    assert any(
        "The best uniform setting is the best of" in note or "proof" in note
        for note in outcome.notes
    )


def test_too_little_time_for_the_proof_is_reported_with_the_minutes_needed(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    honest = tuner.evaluation.objective.Objective._pass

    def second(self: Any, rows: Any) -> Any:
        clock.now += 1.0 * len(rows)
        return honest(self, rows)

    monkeypatch.setattr(tuner.evaluation.objective.Objective, "_pass", second)
    with pytest.raises(InvalidArgument, match=r"^minutes: .*same command with --minutes") as caught:
        fit(settings(trials=50, minutes=0.1))
    enough = float(re.search(r"--minutes ([\d.]+) or more", str(caught.value))[1])  # type: ignore[index]
    before = clock.now
    outcome = fit(settings(trials=50, minutes=enough))
    assert outcome.table.evidence.examples == 4
    # And the pass that was under way.
    assert clock.now - before < 60 * enough + objective.ROWS_PER_PASS


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("better", [False, True])
def test_the_file_has_the_uniform_alpha_unless_the_table_is_better_or_requested(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, better: bool, keep: bool
) -> None:
    def verdict(*arguments: object, **options: object) -> Evidence:
        honest = judge(*arguments, **options)  # type: ignore[arg-type]
        called = "better" if better else "no_better_than_uniform"
        return honest.model_copy(update={"verdict": called})

    moved = ((0.25,) * 2,) * 2 + ((0.5, 0.75),)

    def found(*arguments: Any) -> SearchResult:
        honest = search(*arguments)
        last = list(honest.bests)[-1]
        best = honest.bests[last]
        honest.bests[last] = replace(best, setting=replace(best.setting, alpha=moved))
        return honest

    monkeypatch.setattr(tuner.proof, "judge", verdict)
    monkeypatch.setattr(tuner.fit, "search", found)
    table = fit(settings(keep_table=keep)).table
    assert (table.policy.alpha == moved) == (better or keep)
    assert is_uniform(table.policy) == (not better and not keep)


def test_without_trials_the_uniform_setting_is_written_as_no_better(
    settings: MakeSettings,
) -> None:
    outcome = fit(settings(trials=0))
    assert is_uniform(outcome.table.policy)
    assert outcome.table.policy.alpha[0][0] == outcome.table.evidence.uniform.alpha
    assert outcome.table.evidence.verdict == "no_better_than_uniform"
    # The uniform stage measures at least one setting.
    assert outcome.table.search.trials == 1


def test_a_budget_that_evicts_nothing_is_refused(settings: MakeSettings) -> None:
    with pytest.raises(InvalidArgument, match="nothing would be evicted"):
        fit(settings(budget=128, budget_ratio=None))


def test_a_budget_too_small_for_the_protected_tokens_is_refused(settings: MakeSettings) -> None:
    with pytest.raises(InvalidArgument, match="accepted: at least 8"):
        fit(settings(budget_ratio=0.02))


@pytest.mark.parametrize("field", ["examples", "holdout"])
def test_more_examples_than_there_are_is_refused_with_how_many_there_are(
    settings: MakeSettings, field: str
) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{field}: 500 sequences.* gives \d+"):
        fit(settings(**{field: 500}))


@pytest.fixture
def ten_held_out_rows(tmp_path: Path) -> Path:
    """A data directory with `few`, whose ten held-out rows give four sequences of 128 tokens."""
    (tmp_path / "few").mkdir()
    write_rows(tmp_path / "few" / "calibration.jsonl", sums(0, 20))
    write_rows(tmp_path / "few" / "validation.jsonl", sums(20, 30))
    return tmp_path


@pytest.mark.parametrize("holdout", [None, 4])
def test_too_few_held_out_rows_are_reported_before_the_search_with_a_remedy(
    settings: MakeSettings,
    ten_held_out_rows: Path,
    capsys: pytest.CaptureFixture[str],
    holdout: int | None,
) -> None:
    outcome = fit(settings(dataset="few", data_dir=ten_held_out_rows, holdout=holdout, trials=0))
    assert outcome.table.evidence.examples == 4
    before, _, _ = capsys.readouterr().err.partition("stage 1 of")
    (line,) = (line for line in before.splitlines() if line.startswith("Too few examples: 4 "))
    assert line.endswith(
        "A verdict needs at least 9, and good intervals 16. What helps: more rows in the data, or "
        "a smaller --length."
    )
    assert outcome.remedy == "more rows in the data, or a smaller --length"


def test_too_many_held_out_sequences_are_refused_with_a_remedy(
    settings: MakeSettings, ten_held_out_rows: Path
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        fit(settings(dataset="few", data_dir=ten_held_out_rows, holdout=16))
    for words in ("gives 4; add rows, or change --length (a smaller one", "a verdict needs 9"):
        assert words in str(refused.value)


@pytest.fixture
def two_datasets(tmp_path: Path) -> Path:
    """A data directory with `low` and `high`, rows of small and of large numbers."""
    for name, first in (("low", 0), ("high", 5000)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "calibration.jsonl", sums(first, first + 40))
        write_rows(tmp_path / name / "validation.jsonl", sums(first + 40, first + 120))
    return tmp_path


def test_a_mixture_has_equally_many_examples_of_each_dataset_and_names_all(
    settings: MakeSettings, two_datasets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Example]] = []
    honest = tuner.data.packing.digest
    monkeypatch.setattr(
        tuner.data.packing, "digest", lambda made: seen.append(made) or honest(made)
    )
    mixed = settings(dataset="low,high", data_dir=two_datasets, examples=4, holdout=4, trials=0)
    table = fit(mixed).table
    assert (table.calibration.dataset, table.evidence.dataset) == ("low,high", "low,high")
    assert (table.calibration.examples, table.evidence.examples) == (4, 4)
    alone = []
    for name in ("low", "high"):
        before = len(seen)
        fit(replace(mixed, dataset=name, examples=2, out=two_datasets / f"{name}.json"))
        alone.append(seen[before])
    first, second = alone
    assert seen[0] == [first[0], second[0], first[1], second[1]]


def test_a_dataset_that_is_mixed_with_itself_is_refused(settings: MakeSettings) -> None:
    with pytest.raises(InvalidArgument, match="'sums' is given twice"):
        fit(settings(dataset="sums,sums"))
