"""The subjects of the demonstration: a model, the questions that it is asked, and its table.

Owns the text and its questions. Knows nothing of servers or of what is printed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from a2sf.policy import CachePolicy
from scripts.real_model import DIRECTORY
from tuner.data.generated import recall_episode

ROOT = Path(__file__).resolve().parents[1]


_LINES = """
Calder Point is a fishing town on the northern coast. It was founded in 1683 by Elias Thornbury, a
captain whose ship, the Grey Heron, had been lost on the rocks below the cliff. For sixty years
the town had no light, and nine more ships went down in the bay. The lighthouse that still stands
there was built by Margaret Ashdown, the daughter of a mason, who carried the plans in her head
because she could not write. It is forty metres high and was painted red and white in 1802.

The harbour brought trade. Timber came from the east, salt from the south, and by the end of the
century the town had three thousand people, two churches and a school. A factory on the hill began
to make violin strings, which were sold as far away as Vienna. When the railway came, the factory
grew, and the old market was moved to the meadow behind the station. The great storm of that
winter tore the roof from the town hall, and it was seven years before the money for a new one was
found.

The library was a gift of Doctor Samuel Okafor, who had come as a ship's surgeon and stayed. He
gave the house, the books and his collection of maps, on the condition that nobody should ever pay
to read there. Each autumn the town holds a fair in his memory, with a race of rowing boats from
the pier to the island and back. The mayor opens it by ringing the bell of the Grey Heron, which
divers had found in the bay. Visitors come by train in the morning, eat smoked mackerel on the
quay, walk up to the cliff to see the sun go down, and leave again with the last train at night.
"""


TEXT = "\n\n".join(" ".join(part.split()) for part in _LINES.split("\n\n"))


SHOWN = (
    ("What sort of town is Calder Point?", "a fishing town on the northern coast"),
    ("How many ships were lost in the bay?", "nine more ships"),
)
"""Answered in the prompt, so that the model sees the form of an answer."""


ASKED = (
    ("Who built the lighthouse?", "Margaret Ashdown"),
    ("What does the factory on the hill make?", "violin strings"),
    ("Who gave the library to the town?", "Samuel Okafor"),
    ("What was the name of the ship that was lost on the rocks?", "Grey Heron"),
    ("What do visitors eat on the quay?", "smoked mackerel"),
    ("Where was the old market moved to?", "the meadow behind the station"),
)
"""Six questions that the model answers correctly with the full cache. Questions that it cannot
answer would test the model, not the cache."""


@dataclass(frozen=True)
class Subject:
    """A model, its questions, and the table that was fitted for it."""

    title: str
    model: str
    tables: str
    table: str
    budget: int
    """Tokens that the window and the table keep: a fifth of prompt and answer."""
    questions: tuple[tuple[str, str], ...]
    """Questions about the text, and the words that a right answer contains."""
    prompt: Callable[[str], str]
    max_new_tokens: int
    prefill_chunk: int
    ask: str
    """A suggestion for the reader's next prompt, as an argument of the client's command line."""


def real_subject() -> Subject:
    """SmolLM2 with questions about TEXT."""
    shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in SHOWN)
    return Subject(
        title="SmolLM2-135M-Instruct",
        model=str(DIRECTORY.relative_to(ROOT)),
        tables="benchmarks/tables/smollm2",
        table="smollm2-wikitext2",
        budget=86,
        questions=ASKED,
        prompt=lambda question: f"{TEXT}\n\n{shown}Question: {question}\nAnswer:",
        max_new_tokens=12,
        prefill_chunk=0,
        ask='--chat "Why is the sky blue?"',
    )


def reference_subject() -> Subject:
    """The packaged model, asked for numbers that its text states once."""
    episode = recall_episode(Random(0), split="validation", facts=40, questions=6)
    return Subject(
        title="the packaged reference model, which knows but few words",
        model="reference",
        tables="benchmarks/tables",
        table="recall",
        budget=102,
        questions=episode.turns,
        prompt=lambda question: episode.context + question,
        max_new_tokens=1,
        # Small, so that an answer of one token uses a cache from which tokens have been evicted.
        prefill_chunk=8,
        ask='"Once upon a time"',
    )


def caches(subject: Subject) -> dict[str, CachePolicy]:
    """The compared caches, by their names on the screen."""
    small = CachePolicy(budget=subject.budget, prefill_chunk=subject.prefill_chunk)
    return {
        "full cache": CachePolicy(preset="full"),
        "window": small.model_copy(update={"preset": "window"}),
        "fitted table": small.model_copy(update={"table": subject.table}),
    }
