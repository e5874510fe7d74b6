"""Text documents of the data directory, for the tokenizer and for training.

Owns which files and lines may be learned from. Validation files are never opened here: the part of
each corpus that is held out for measuring is its last 5 %, and of each calibration file every line
with an even index.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Part = Literal["train", "held_out"]

CHOICE_SETS = (
    "mathqa",
    "openbookqa",
    "winogrande",
    "piqa",
    "copa",
    "arc_easy",
    "arc_challenge",
)
TEXTS: dict[str, str] = {
    "stories": "corpora/tinystories_sample.txt",
    "wikipedia": "corpora/wikipedia_sample.txt",
    "shakespeare": "corpora/tinyshakespeare.txt",
    "wikitext2": "wikitext2/calibration.txt",
}
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class ChoiceQuestion:
    """One multiple-choice question; ``answer`` is a 0-based index into ``choices``."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """The text before the answer, without a trailing space."""
        listed = " ".join(
            f"{LETTERS[index]}) {choice}" for index, choice in enumerate(self.choices)
        )
        return f"Question: {self.question}\nChoices: {listed}\nAnswer:"

    @property
    def text(self) -> str:
        """The question with its right answer, one line break at the end."""
        return f"{self.prompt} {self.choices[self.answer]}\n"


def default_data_dir() -> Path:
    """``$A2SF_DATA_DIR``; a usage error without it."""
    value = os.environ.get("A2SF_DATA_DIR")
    if not value:
        raise SystemExit("no data directory: give --data-dir or set A2SF_DATA_DIR")
    return Path(value)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def choice_questions(path: Path) -> list[ChoiceQuestion]:
    """All multiple-choice questions of a JSONL file."""
    return [
        ChoiceQuestion(row["question"], tuple(row["choices"]), row["answer"])
        for row in read_jsonl(path)
    ]


def text_documents(data_dir: Path, name: str, part: Part) -> list[str]:
    """Documents of a plain text of :data:`TEXTS`: its first 95 % of characters, or the rest."""
    text = (data_dir / TEXTS[name]).read_text(encoding="utf-8")
    cut = text.find("\n", int(0.95 * len(text))) + 1
    text = text[:cut] if part == "train" else text[cut:]
    if name == "wikipedia":
        pieces = re.split(r"</?doc[^>]*>", text)
    elif name == "wikitext2":
        pieces = re.split(r"\n(?= = [^=])", text)
    else:
        pieces = re.split(r"<\|endoftext\|>", text)
    return [piece.strip() + "\n" for piece in pieces if piece.strip()]


def choice_documents(data_dir: Path, name: str, part: Part) -> list[str]:
    """Questions with answers: the odd lines of the calibration file, or the even ones."""
    questions = choice_questions(data_dir / name / "calibration.jsonl")
    return [question.text for question in questions[1 if part == "train" else 0 :: 2]]


def gsm8k_text(row: dict[str, Any]) -> str:
    """A worked solution in the form of ``train.jsonl``: without calculator marks and last line."""
    solution = re.sub(r"<<.*?>>", "", row["answer_text"]).split("\n####")[0]
    return f"Question: {row['question']}\nAnswer: {solution}\n"


def gsm8k_documents(data_dir: Path, part: Part) -> list[str]:
    """Worked solutions; the even lines of the calibration file are taken out of train."""
    calibration = read_jsonl(data_dir / "gsm8k" / "calibration.jsonl")
    held_out = {row["id"] for row in calibration[0::2]}
    rows = read_jsonl(data_dir / "gsm8k" / "train.jsonl")
    return [gsm8k_text(row) for row in rows if (row["id"] in held_out) == (part == "held_out")]


def documents(data_dir: Path, part: Part) -> dict[str, list[str]]:
    """Every source of text by name."""
    found = {name: text_documents(data_dir, name, part) for name in TEXTS}
    found |= {name: choice_documents(data_dir, name, part) for name in CHOICE_SETS}
    return found | {"gsm8k": gsm8k_documents(data_dir, part)}
