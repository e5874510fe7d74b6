"""Data sets as two parts: one for the search, and one that is held out for the proof.

Owns the split of a single file, and the check that no held-out row is also in the other part. Knows
nothing of names or places (`tuner.data.datasets`), of tokens or of models.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from a2sf.errors import InvalidArgument
from tuner.data.rows import KIND_NAMES, Conversation, Row, Text, Turn, read_file

SPLITS = ("calibration", "validation")


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
    generate: Callable[[Random, int], Group] | None = None
    """Makes one context with this many facts, at least two and at most `max_facts`, and its
    questions."""
    max_facts: int = 0


@dataclass(frozen=True)
class Dataset:
    """Data for the search and data for the proof."""

    name: str
    calibration: Part
    validation: Part
    description: str
    """Contents and split, in a sentence for people."""


def from_two_files(name: str, calibration: Path | None, validation: Path | None) -> Dataset:
    """Make a dataset of two files. Raises InvalidArgument if their kinds of rows differ."""
    assert calibration is not None
    assert validation is not None
    calibration_content = read_file(calibration)
    validation_content = read_file(validation)
    if _kind(calibration_content) != _kind(validation_content):
        raise InvalidArgument(
            "dataset",
            f"{calibration} holds {_kind(calibration_content)} and {validation} "
            f"{_kind(validation_content)}; accepted: the same in both",
        )
    return _dataset_of(
        name,
        calibration_content,
        validation_content,
        f"{calibration.name}",
        f"{validation.name}",
        SPLITS,
    )


def from_single_file(path: Path) -> Dataset:
    """Make a dataset of one file, whose end is held out."""
    content = read_file(path)
    cut = round(len(content) * (1 - HELD_OUT_SHARE))
    first, last = f"all but the last {HELD_OUT_SHARE:.0%}", f"the last {HELD_OUT_SHARE:.0%}"
    # The name keeps its suffix: mine.txt and mine.jsonl are two datasets.
    return _dataset_of(path.name, content[:cut], content[cut:], first, last, (first, last))


def _dataset_of(
    name: str,
    calibration_content: str | list[Row],
    validation_content: str | list[Row],
    first: str,
    last: str,
    splits: tuple[str, str],
) -> Dataset:
    """Make a dataset of two contents; its description calls them `first` and `last`."""
    calibration, validation = (
        _part(splits[0], calibration_content),
        _part(splits[1], validation_content, without=calibration_content),
    )
    description = (
        f"{name} holds {_kind(calibration_content)}; calibration: {first} "
        f"({_size(calibration_content)}), validation: {last} "
        f"({_size(validation_content)})"
    )
    if isinstance(calibration_content, list):
        known = frozenset(calibration_content)
        if both := sum(row in known for row in validation_content if not isinstance(row, str)):
            description += f", {both} of them left out because calibration has them too"
    return Dataset(name, calibration, validation, description)


def _kind(content: str | list[Row]) -> str:
    if isinstance(content, str):
        return "running text"
    return KIND_NAMES[type(content[0])] if content else "no rows"


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
