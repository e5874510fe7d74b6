"""Where calibration data comes from, and what one row of it says.

Owns the names of the known datasets, the places that are searched for one, and the wording in which
a row becomes questions and answers. Knows nothing of tokens or models: `packing` does. Examples to
search on come from `calibration`, examples to prove on from `validation`, and never the other way.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import huggingface_hub

from a2sf.errors import InvalidArgument, NotFound
from tuner import generated
from tuner.generated import RECALL_FORMS, STATE_FORMS

DATA_DIR_VARIABLE = "A2SF_DATA_DIR"

SPLITS = ("calibration", "validation")

FILE_SUFFIXES = (".jsonl", ".txt")
"""How `calibration` and `validation` may be stored: rows, or plain UTF-8 text."""

HELD_OUT_SHARE = 0.2
"""The last part of a single file, which has no `validation` of its own, is held out."""

ROW_FORMS = (
    "{question, choices, answer: index}, {question, answer_text}, {question, answer: text}, "
    "{prompt, answers}"
)


@dataclass(frozen=True)
class Turn:
    """A question and its answer; the text is one after the other. The answer opens with a space."""

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    """All answers to choose from, the right one among them; empty where the answer is free."""


Group = tuple[Turn, ...]
"""Turns that belong together, in order: one question, or several over one context."""


@dataclass(frozen=True)
class Part:
    """One split: running `text`, or rows in `groups`, or groups that are `made` on demand."""

    split: str
    text: str = ""
    groups: Callable[[Random], Iterator[Group]] | None = None
    """All rows, in an order that the random generator decides."""
    made: Callable[[Random, int], Group] | None = None
    """One context of so many facts, at least two and at most `most_facts`, with its questions."""
    most_facts: int = 0


@dataclass(frozen=True)
class Dataset:
    """What to search on and what to prove on."""

    name: str
    calibration: Part
    validation: Part


@dataclass(frozen=True)
class Published:
    """A public dataset, read from the data directory; `origin` is its repository on the hub."""

    origin: str


@dataclass(frozen=True)
class Made:
    """A dataset made by a generator; every example is one context with several questions."""

    episode: Callable[..., generated.Episode]
    most_facts: int = 120
    questions: int = 8


REGISTRY: dict[str, Published | Made] = {
    "mathqa": Published("allenai/math_qa"),
    "openbookqa": Published("allenai/openbookqa"),
    "winogrande": Published("allenai/winogrande"),
    "piqa": Published("ybisk/piqa"),
    "copa": Published("aps/super_glue"),
    "arc_easy": Published("allenai/ai2_arc"),
    "arc_challenge": Published("allenai/ai2_arc"),
    "gsm8k": Published("openai/gsm8k"),
    "wikitext2": Published("Salesforce/wikitext"),
    "recall": Made(generated.recall_episode, questions=16),
    "state": Made(generated.state_episode),
    "arith": Made(generated.arith_episode),
    "copy": Made(generated.copy_episode, questions=1),
    **{
        f"recall_{form}": Made(partial(generated.recall_episode, form=form))
        for form in RECALL_FORMS
        if form != "talk"
    },
    **{f"state_{f}": Made(partial(generated.state_episode, form=f)) for f in STATE_FORMS},
}
"""One line a dataset. A folder in the data directory is found by its name without being here."""


def load(name: str, data_dir: Path | None) -> Dataset:
    """Find and read the dataset `name`: a known name, a folder or file, or a repository on the hub.

    Looked up in this order: generated datasets; `data_dir`/`name`; `name` as a path; and, where it
    reads owner/repository, a dataset repository on the hub that holds the same files as a folder
    would. Raises NotFound, which says where it looked and what to do, or InvalidArgument.
    """
    known = REGISTRY.get(name)
    if isinstance(known, Made):
        return Dataset(name, _made(known, "calibration"), _made(known, "validation"))
    looked = []
    if data_dir is not None:
        looked.append(f"{data_dir / name}")
        if name and (data_dir / name).is_dir():
            return _folder(name, data_dir / name)
    path = Path(name)
    looked.append(f"{path} as a path")
    if name and path.is_dir():
        return _folder(path.resolve().name, path)
    if path.is_file():
        return _single_file(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _hub(name, looked)
    raise NotFound(f"dataset {name!r} not found: {_advice(name, known, data_dir, looked)}")


def load_all(names: str, data_dir: Path | None) -> list[Dataset]:
    """Read one dataset, or several with commas between their names.

    Raises as `load` does, and InvalidArgument where one is named twice.
    """
    if Path(names).is_file():  # whose own name may hold a comma
        return [load(names, data_dir)]
    found = [load(name.strip(), data_dir) for name in names.split(",")]
    for name in (dataset.name for dataset in found):
        if [dataset.name for dataset in found].count(name) > 1:
            raise InvalidArgument("dataset", f"{name!r} is given twice")
    return found


def data_directory(option: Path | None) -> Path | None:
    """Return the directory that datasets are looked up in: the option, else the environment's."""
    if option is not None:
        if not option.is_dir():
            raise NotFound(f"--data-dir {option}: not a directory")
        return option
    value = os.environ.get(DATA_DIR_VARIABLE)
    return Path(value) if value else None


def _advice(name: str, known: Published | None, data_dir: Path | None, looked: list[str]) -> str:
    where = "looked for " + " and ".join(looked)
    if data_dir is None:
        where += f" (neither --data-dir nor ${DATA_DIR_VARIABLE} is set)"
    if known is None:
        return f"{where}; known names are {', '.join(REGISTRY)}; or give a .jsonl or text file"
    return (
        f"{where}; the original is https://huggingface.co/datasets/{known.origin}, whose files "
        f"are not read directly: store its rows as DIR/{name}/calibration.jsonl and "
        f"validation.jsonl (or .txt), one of {ROW_FORMS} a line, and give --data-dir DIR"
    )


def _folder(name: str, folder: Path) -> Dataset:
    files = {}
    for split in SPLITS:
        found = [folder / (split + suffix) for suffix in FILE_SUFFIXES]
        files[split] = next((path for path in found if path.is_file()), None)
        if files[split] is None:
            raise NotFound(
                f"dataset {name!r}: {folder} holds neither {found[0].name} nor {found[1].name}; "
                "other files are not read; put one there, with rows such as "
                f"{ROW_FORMS}, or give a single file as --dataset"
            )
    return _dataset(name, files["calibration"], files["validation"])


def _hub(repository: str, looked: list[str]) -> Dataset:
    """Read a dataset repository that holds the same files as a folder would."""
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            repo_type="dataset",
            allow_patterns=[split + suffix for split in SPLITS for suffix in FILE_SUFFIXES],
        )
    except (huggingface_hub.errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotFound(
            f"dataset {repository!r} not found: looked for {' and '.join(looked)}, and for that "
            f"dataset repository on the Hugging Face hub: {reason}"
        ) from error
    return _folder(repository, Path(folder))


def _dataset(name: str, calibration: Path | None, validation: Path | None) -> Dataset:
    assert calibration is not None
    assert validation is not None
    seen = _read(calibration)
    unseen = _read(validation)
    if isinstance(seen, str) != isinstance(unseen, str):
        raise InvalidArgument("dataset", f"{calibration} and {validation}: one rows, one text")
    return Dataset(name, _part("calibration", seen), _part("validation", unseen, without=seen))


def _single_file(path: Path) -> Dataset:
    content = _read(path)
    cut = round(len(content) * (1 - HELD_OUT_SHARE))
    seen, unseen = content[:cut], content[cut:]
    held = f"{HELD_OUT_SHARE:.0%}"
    return Dataset(
        path.stem,
        _part(f"all but the last {held}", seen),
        _part(f"the last {held}", unseen, without=seen),
    )


def _part(split: str, content: str | list[Turn], without: str | list[Turn] = "") -> Part:
    if isinstance(content, str):
        return Part(split, text=content)
    # A row that was searched on proves nothing.
    known = frozenset(without)
    turns = [turn for turn in content if turn not in known]

    def shuffled(rng: Random) -> Iterator[Group]:
        order = list(range(len(turns)))
        rng.shuffle(order)
        return ((turns[index],) for index in order)

    return Part(split, groups=shuffled)


def _made(source: Made, split: str) -> Part:
    def group(rng: Random, facts: int) -> Group:
        episode = source.episode(rng, split=split, facts=facts, questions=source.questions)
        first, *rest = (Turn(question, answer) for question, answer in episode.turns)
        return (Turn(episode.context + first.question, first.answer), *rest)

    return Part(split, made=group, most_facts=source.most_facts)


def _read(path: Path) -> str | list[Turn]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            "dataset", f"{path}: cannot be read as UTF-8 text: {error}"
        ) from error
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        return text
    turns = []
    # Not splitlines(): a row's text may hold any of the rarer line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            turns.append(turn_of(json.loads(line)))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InvalidArgument(
                "dataset",
                f"{path}, line {number}: not a row of a known form ({error}); each line is one of "
                f"{ROW_FORMS}",
            ) from error
    return turns


def turn_of(row: Mapping[str, Any]) -> Turn:
    """Put one row into words. Raises ValueError, KeyError, TypeError or IndexError if it cannot."""
    if "prompt" in row:
        return Turn(str(row["prompt"]), " " + str(row["answers"][0]).strip())
    question = f"Question: {str(row['question']).strip()}\n"
    if "choices" in row:
        index, choices = row["answer"], [str(choice).strip() for choice in row["choices"]]
        if not isinstance(index, int) or not 0 <= index < len(choices):
            raise ValueError(f"answer {index!r} is no index into {len(choices)} choices")
        lettered = (f"{chr(ord('A') + n)}) {choice}" for n, choice in enumerate(choices))
        answers = tuple(f" {choice}" for choice in choices)
        return Turn(f"{question}Choices: {' '.join(lettered)}\nAnswer:", answers[index], answers)
    answer = row.get("answer_text", row.get("answer"))
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError("no answer")
    return Turn(f"{question}Answer:", " " + answer.strip())
