"""A small dataset in the known form, and settings for fits that take a second."""

import json
from pathlib import Path
from random import Random
from typing import Any, Protocol

import optuna
import pytest

import tuner.search.uniform
from tests.tuner.planted import Clock
from tuner.settings import FitSettings
from tuner.study.records import BATCH, FINISHED, INDEX
from tuner.study.storage import open_storage


@pytest.fixture(autouse=True)
def _no_data_directory_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A2SF_DATA_DIR", raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What the ledger times measuring by."""
    clock = Clock()
    monkeypatch.setattr("tuner.study.ledger.time.perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six uniform settings in the place of 88, for fits that take a second."""
    monkeypatch.setattr(tuner.search.uniform, "GRID", tuner.search.uniform.GRID[::15])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(first: int, last: int) -> list[dict[str, Any]]:
    """Multiple-choice rows, none like another."""
    rows = []
    for number in range(first, last):
        rng = Random(number)
        choices = [str(number + offset) for offset in rng.sample(range(9), 3)]
        rows.append(
            {"question": f"what is {number} ?", "choices": choices, "answer": rng.randrange(3)}
        )
    return rows


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory that holds one dataset, `sums`."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "sums").mkdir()
    write_rows(directory / "sums" / "calibration.jsonl", sums(0, 80))
    write_rows(directory / "sums" / "validation.jsonl", sums(80, 200))
    return directory


@pytest.fixture
def small_fit(
    tiny_model_dir: Path, small_data: Path, tmp_path: Path, small_grid: None
) -> list[object]:
    """The flags of a fit that takes a second."""
    return [
        *("--dataset", "sums", "--data-dir", small_data, "--model", tiny_model_dir),
        *("--trials", 6, "--examples", 2, "--holdout", 4, "--length", 128),
        *("--out", tmp_path / "sums.json"),
    ]


@pytest.fixture
def small_evaluation(tiny_model_dir: Path, small_data: Path) -> list[object]:
    """The flags of an evaluation that takes a second."""
    return [
        *("evaluate", "--dataset", "sums", "--data-dir", small_data, "--model", tiny_model_dir),
        *("--examples", 3, "--length", 128, "--policies", "full,h2o,a2sf:.9"),
    ]


class MakeSettings(Protocol):
    def __call__(self, **overrides: Any) -> FitSettings: ...


@pytest.fixture
def settings(
    small_data: Path, tiny_model_dir: Path, tmp_path: Path, small_grid: None
) -> MakeSettings:
    """Settings of a fit of the tiny model to `sums`, writing under `tmp_path`."""

    def make(**overrides: Any) -> FitSettings:
        values: dict[str, Any] = {
            "dataset": "sums",
            "out": tmp_path / "sums.json",
            "name": "sums",
            "study": "sums",
            "model": str(tiny_model_dir),
            "revision": None,
            "budget": None,
            "budget_ratio": 0.2,
            "prefill_chunk": 0,
            "data_dir": small_data,
            "stages": ("layers", "heads"),
            "trials": 6,
            "minutes": None,
            "examples": 2,
            "holdout": 4,
            "length": 128,
            "seed": 0,
            "storage": None,
            "device": "cpu",
            "dtype": "float32",
            "keep_table": False,
        }
        return FitSettings(**{**values, **overrides})

    return make


def finished(journal: Path) -> list[tuple[str, int]]:
    """Batch and index of the points that a journal holds as measured."""
    storage, _ = open_storage(None, journal)
    try:
        study = optuna.load_study(study_name="sums", storage=storage)
    except KeyError:
        return []
    trials = study.get_trials(states=FINISHED)
    return [(trial.user_attrs[BATCH], trial.user_attrs[INDEX]) for trial in trials]
