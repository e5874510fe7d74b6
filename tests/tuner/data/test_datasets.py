"""Where datasets are found, what their rows say, and what is said when there is none."""

from pathlib import Path
from random import Random

import huggingface_hub
import pytest

from a2sf.errors import NotFound
from tests.tuner.conftest import sums, write_rows
from tuner.data import datasets
from tuner.data.datasets import REGISTRY, load
from tuner.data.parts import Part
from tuner.data.rows import Turn, row_of


def turns(part: Part, seed: int = 0) -> list[Turn]:
    assert part.groups is not None
    return [turn for group in part.groups(Random(seed)) for turn in group]


@pytest.mark.parametrize("name", [n for n, k in REGISTRY.items() if hasattr(k, "origin")])
def test_every_registered_dataset_is_read_whole_and_holds_two_kinds_of_data(
    name: str, data_dir: Path
) -> None:
    if not (data_dir / name).is_dir():
        pytest.skip(f"no {name} in {data_dir}")
    dataset = load(name, data_dir)
    if dataset.calibration.groups is None:
        assert dataset.calibration.text != dataset.validation.text
        assert min(len(dataset.calibration.text), len(dataset.validation.text)) > 100_000
        return
    seen, unseen = set(turns(dataset.calibration)), set(turns(dataset.validation))
    assert len(seen) > 400
    assert len(unseen) > 200
    assert not seen & unseen
    assert all(turn.answer.startswith(" ") and turn.answer.strip() for turn in seen)


def test_rows_that_were_searched_on_are_left_out_of_the_proof(tmp_path: Path) -> None:
    folder = tmp_path / "leaky"
    folder.mkdir()
    write_rows(folder / "calibration.jsonl", sums(0, 10))
    write_rows(folder / "validation.jsonl", sums(5, 15))
    dataset = load("leaky", tmp_path)
    assert set(turns(dataset.validation)) == {row_of(row) for row in sums(10, 15)}


def test_a_single_file_is_cut_into_a_part_to_search_on_and_a_last_part_to_prove_on(
    tmp_path: Path,
) -> None:
    dataset = load(str(write_rows(tmp_path / "mine.jsonl", sums(0, 10))), None)
    assert dataset.name == "mine.jsonl"
    assert set(turns(dataset.calibration)) == {row_of(row) for row in sums(0, 8)}
    assert set(turns(dataset.validation)) == {row_of(row) for row in sums(8, 10)}


def test_a_text_file_of_any_name_is_text(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_text("a" * 80 + "b" * 20, encoding="utf-8")
    dataset = load(str(path), None)
    assert (dataset.calibration.text, dataset.validation.text) == ("a" * 80, "b" * 20)


def test_the_same_seed_gives_the_same_order_and_another_seed_another(small_data: Path) -> None:
    part = load("sums", small_data).calibration
    assert turns(part, 1) == turns(part, 1) != turns(part, 2)


@pytest.mark.parametrize("name", [n for n, k in REGISTRY.items() if hasattr(k, "episode")])
def test_generated_datasets_ask_different_things_in_the_two_splits(name: str) -> None:
    dataset = load(name, None)
    asked = []
    for part in (dataset.calibration, dataset.validation):
        assert part.generate is not None
        groups = [part.generate(Random(seed), 20) for seed in range(20)]
        assert all(len(group) > 1 for group in groups) or name == "copy"
        asked.append({(t.question.rsplit("\n", 1)[-1], t.answer) for g in groups for t in g})
    assert not asked[0] & asked[1]


def test_an_unknown_name_is_reported_with_the_searched_places_and_known_names(
    tmp_path: Path,
) -> None:
    with pytest.raises(NotFound) as caught:
        load("mathq", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "mathq") in message
    assert "mathqa, openbookqa" in message


def test_a_known_name_without_data_names_the_original_and_what_to_do() -> None:
    with pytest.raises(NotFound) as caught:
        load("gsm8k", None)
    message = str(caught.value)
    assert "openai/gsm8k" in message
    assert "$A2SF_DATA_DIR is set" in message
    assert "gsm8k/calibration.jsonl" in message


def test_a_folder_without_both_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    write_rows(tmp_path / "half" / "calibration.jsonl", sums(0, 3))
    with pytest.raises(NotFound, match=r"neither validation\.jsonl nor validation\.txt"):
        load("half", tmp_path)


def test_a_repository_on_the_hub_is_read_like_a_folder(
    small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, **options: object) -> str:
        asked.append((repository, options))
        return str(small_data / "sums")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    dataset = load("someone/sums", None)
    assert dataset.name == "someone/sums"
    assert turns(dataset.calibration) == turns(load("sums", small_data).calibration)
    ((repository, options),) = asked
    assert repository == "someone/sums"
    assert options["repo_type"] == "dataset"
    assert "calibration.jsonl" in options["allow_patterns"]  # type: ignore[operator]


def test_an_unreachable_hub_is_reported_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def download(repository: str, **options: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(NotFound, match=r"someone/sums.*no connection$"):
        load("someone/sums", None)


def test_a_data_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="--data-dir"):
        datasets.data_directory(tmp_path / "none")


def test_the_data_directory_comes_from_the_environment_where_no_option_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert datasets.data_directory(None) is None
    monkeypatch.setenv("A2SF_DATA_DIR", "/elsewhere")
    assert datasets.data_directory(None) == Path("/elsewhere")
    assert datasets.data_directory(tmp_path) == tmp_path
