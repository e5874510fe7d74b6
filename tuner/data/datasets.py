"""Finds calibration data and splits off the held-out part.

Owns the names of the known datasets, the places that are searched, and the split. Knows nothing of
tokens or models; `packing` does. Examples for the search come only from `calibration`, and examples
for the proof only from `validation`.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import huggingface_hub

from a2sf.errors import InvalidArgument, NotFound, did_you_mean
from tuner.data import generated
from tuner.data.generated import RECALL_FORMS, STATE_FORMS
from tuner.data.rows import NAMES, ROW_FORMS, ROW_SUFFIXES, Conversation, Row, Text, Turn, read_file

DATA_DIR_VARIABLE = "A2SF_DATA_DIR"

SPLITS = ("calibration", "validation")

FILE_SUFFIXES = (".jsonl", ".txt")
"""Formats of `calibration` and `validation`: rows, or plain UTF-8 text."""

HELD_OUT_SHARE = 0.2
"""A single file contains no separate `validation`, so this share at its end is held out."""

Group = tuple[Turn, ...]
"""Turns that belong together, in order: one question, or several about one context."""


@dataclass(frozen=True)
class Part:
    """One split: running `text`, groups, conversations, or groups that are `made` on demand."""

    split: str
    text: str = ""
    groups: Callable[[Random], Iterator[Group]] | None = None
    """All rows, in an order that the random generator decides."""
    conversations: Callable[[Random], Iterator[Conversation]] | None = None
    """All conversations, likewise; the model's chat template renders them."""
    made: Callable[[Random, int], Group] | None = None
    """Makes one context with this many facts, at least two and at most `most_facts`, and its
    questions."""
    most_facts: int = 0


@dataclass(frozen=True)
class Dataset:
    """Data for the search and data for the proof."""

    name: str
    calibration: Part
    validation: Part
    told: str
    """Contents and split, in a sentence for people."""


@dataclass(frozen=True)
class Published:
    """A public dataset, read from the data directory; `origin` is its repository on the hub."""

    origin: str


@dataclass(frozen=True)
class Made:
    """A dataset made by a generator. Each example is one context with several questions."""

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
"""One line per dataset. A folder in the data directory is found by its name without an entry
here."""


def load(name: str, data_dir: Path | None) -> Dataset:
    """Find and read the dataset `name`: a known name, a folder or file, or a repository on the hub.

    The order of the search: generated datasets; `data_dir`/`name`; `name` as a path; and, if it has
    the form owner/repository, a dataset repository on the hub with the same files as a folder.
    Raises NotFound, which lists the places searched and the remedy, or InvalidArgument.
    """
    known = REGISTRY.get(name)
    if isinstance(known, Made):
        told = f"{name} is generated; what it asks in one split it never asks in the other"
        return Dataset(name, _made(known, "calibration"), _made(known, "validation"), told)
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
    # A name with a file's suffix is a missing file, not a repository.
    file = path.suffix.lower() in (*ROW_SUFFIXES, *FILE_SUFFIXES)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not file:
        return _hub(name, looked)
    raise NotFound(f"dataset {name!r} not found{_advice(name, known, data_dir, looked)}")


def load_all(names: str, data_dir: Path | None) -> list[Dataset]:
    """Read one dataset, or several with commas between their names.

    Raises as `load` does, and InvalidArgument if one is named twice.
    """
    if Path(names).is_file():  # the file's own name may contain a comma
        return [load(names, data_dir)]
    found = [load(name.strip(), data_dir) for name in names.split(",")]
    for name in (dataset.name for dataset in found):
        if [dataset.name for dataset in found].count(name) > 1:
            raise InvalidArgument("dataset", f"{name!r} is given twice")
    return found


def data_directory(option: Path | None) -> Path | None:
    """Return the data directory: the option, else the environment variable."""
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
        own = [folder for folder in _folders(data_dir) if folder not in REGISTRY]
        return (
            f"{did_you_mean(name, [*REGISTRY, *own]) or '.'} Known names are {', '.join(REGISTRY)}"
            + (f", and {', '.join(own)} in {data_dir}" if own else "")
            + f"; {where}; or give a .jsonl or text file"
        )
    return (
        f": {where}; the original is https://huggingface.co/datasets/{known.origin}, whose files "
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
    """Read a dataset repository that holds the same files as a folder."""
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


def _folders(data_dir: Path | None) -> list[str]:
    """Names of the datasets in the data directory."""
    if data_dir is None:
        return []
    files = [split + suffix for split in SPLITS for suffix in FILE_SUFFIXES]
    return sorted({path.parent.name for file in files for path in data_dir.glob(f"*/{file}")})


def _dataset(name: str, calibration: Path | None, validation: Path | None) -> Dataset:
    assert calibration is not None
    assert validation is not None
    seen = read_file(calibration)
    unseen = read_file(validation)
    if _kind(seen) != _kind(unseen):
        raise InvalidArgument(
            "dataset",
            f"{calibration} holds {_kind(seen)} and {validation} {_kind(unseen)}; accepted: the "
            "same in both",
        )
    return _split(name, seen, unseen, f"{calibration.name}", f"{validation.name}", SPLITS)


def _single_file(path: Path) -> Dataset:
    content = read_file(path)
    cut = round(len(content) * (1 - HELD_OUT_SHARE))
    first, last = f"all but the last {HELD_OUT_SHARE:.0%}", f"the last {HELD_OUT_SHARE:.0%}"
    # The name keeps its suffix: mine.txt and mine.jsonl are two datasets.
    return _split(path.name, content[:cut], content[cut:], first, last, (first, last))


def _split(
    name: str,
    seen: str | list[Row],
    unseen: str | list[Row],
    first: str,
    last: str,
    splits: tuple[str, str],
) -> Dataset:
    """Make a dataset of two contents; its description calls them `first` and `last`."""
    calibration, validation = _part(splits[0], seen), _part(splits[1], unseen, without=seen)
    told = (
        f"{name} holds {_kind(seen)}; searched on {first} ({_size(seen)}), proved on {last} "
        f"({_size(unseen)})"
    )
    if isinstance(seen, list):
        known = frozenset(seen)
        if both := sum(row in known for row in unseen if not isinstance(row, str)):
            told += f", {both} of them left out because they are searched on"
    return Dataset(name, calibration, validation, told)


def _kind(content: str | list[Row]) -> str:
    if isinstance(content, str):
        return "running text"
    return NAMES[type(content[0])] if content else "no rows"


def _size(content: str | list[Row]) -> str:
    return f"{len(content):,} " + ("characters" if isinstance(content, str) else "rows")


def _part(split: str, content: str | list[Row], without: str | list[Row] = "") -> Part:
    if isinstance(content, str):
        return Part(split, text=content)
    # Rows that the search has seen prove nothing.
    known = frozenset(without)
    rows = [row for row in content if row not in known]

    def shuffled(rng: Random) -> Iterator[Row]:
        order = list(range(len(rows)))
        rng.shuffle(order)
        return (rows[index] for index in order)

    def groups(rng: Random) -> Iterator[Group]:
        return ((row,) for row in shuffled(rng) if isinstance(row, Turn))

    def conversations(rng: Random) -> Iterator[Conversation]:
        return (row for row in shuffled(rng) if isinstance(row, Conversation))

    if rows and isinstance(rows[0], Conversation):
        return Part(split, conversations=conversations)
    texts = [row.text for row in rows if isinstance(row, Text)]
    return Part(split, text="\n\n".join(texts)) if texts else Part(split, groups=groups)


def _made(source: Made, split: str) -> Part:
    def group(rng: Random, facts: int) -> Group:
        episode = source.episode(rng, split=split, facts=facts, questions=source.questions)
        first, *rest = (Turn(question, answer) for question, answer in episode.turns)
        return (Turn(episode.context + first.question, first.answer), *rest)

    return Part(split, made=group, most_facts=source.most_facts)
