"""Generated questions whose answers stand in their own context: recall, state, arith, copy.

Owns the wording, the sizes and the splits. A fact is asked only in the split that a stable hash of
the asked content decides, so a pair asked in validation is never asked in train, whatever the
seeds; facts that are merely stated may belong to any split. Knows nothing of tokenizers or models.

Every number is an integer from 1 to 999, one token for the reference model's tokenizer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

Split = Literal["train", "calibration", "validation"]
RecallForm = Literal["list", "sentence", "pair", "story"]

RECALL_FORMS: tuple[RecallForm, ...] = get_args(RecallForm)
SENTENCE_FORMS: tuple[RecallForm, ...] = ("sentence", "pair", "story")

_NOUNS = """
    lamp chair table door window key book pen cup plate bowl spoon knife fork bottle basket box
    bag coat hat shoe ring watch clock mirror picture brush broom bucket rope ladder hammer nail saw
    wheel cart boat ship train car truck bike plane kite drum bell horn flute piano guitar violin
    ball doll puzzle card coin stamp letter map flag tent blanket pillow bed sofa carpet curtain
    shelf desk drawer safe chest jar pot pan oven stove kettle candle torch camera phone radio
    screen engine pump tower bridge gate fence garden tree flower apple pear plum lemon orange
    melon bread cake cheese egg horse cow goat sheep dog cat bird fish frog bear wolf fox lion
    tiger mouse snake turtle stone shell feather
"""
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
_ADJECTIVES = """
    red blue green yellow black white brown gray pink purple golden silver old new big small
    tall short long round square heavy light soft hard clean dirty cold warm bright dark quiet
    loud broken wooden metal glass paper plastic empty
"""
ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
_NAMES = """
    Anna Ben Carl Dora Emma Finn Grace Henry Iris Jack Kate Leo Maria Nora Oscar Paul Rosa Sam
    Tom Vera Will Lily Max Lucy Mark Jane Peter Sarah David Alice
"""
NAMES: tuple[str, ...] = tuple(_NAMES.split())
_PLACES = """
    park market school river station harbor forest library museum kitchen farm beach
    village office hotel church
"""
PLACES: tuple[str, ...] = tuple(_PLACES.split())
ATTRIBUTES: tuple[str, ...] = ("code", "number", "price", "weight", "score", "size", "age", "level")


@dataclass(frozen=True)
class Generated:
    """One question over one context; ``prompt + answer`` is the text, whitespace included.

    The answer begins with its space, as it follows the question.
    """

    context: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """Context and question, ready to be completed."""
        return self.context + self.question


@dataclass(frozen=True)
class Episode:
    """Several questions asked one after another over one context.

    Each turn is ``(question, answer)``; a reader sees the earlier turns before a later one.
    """

    context: str
    turns: tuple[tuple[str, str], ...]


def is_exact(completion: str, answer: str) -> bool:
    """Whether a greedy completion gives the answer: equal words over the answer's length."""
    wanted = answer.split()
    return completion.replace(".", " ").replace(",", " ").split()[: len(wanted)] == wanted


def split_of(*content: str) -> Split:
    """The only split in which this content may be asked: 10 % validation, 10 % calibration."""
    bucket = zlib.crc32("\x1f".join(content).encode()) % 20
    if bucket < 2:
        return "validation"
    return "calibration" if bucket < 4 else "train"


def recall_episode(
    rng: Random, *, split: Split, facts: int, questions: int = 1, form: RecallForm = "pair"
) -> Episode:
    """Facts stated once, then asked in random order without repetition.

    Forms: ``list`` (bare ``lamp 412``), ``sentence`` (one noun a fact), ``pair`` (adjective and
    noun, each shared with other facts, so that one word alone does not identify the fact) and
    ``story`` (pairs between sentences that carry no fact, some of them with numbers of their own).
    At most 120 facts in the one-word forms and 999 in the others.
    """
    keys = _recall_keys(rng, facts, form)
    questions = min(questions, facts)
    asked = rng.sample(range(facts), questions)
    values = [str(value) for value in rng.sample(range(1, 1000), facts)]
    taken = set(values)
    for index in asked:
        while split_of("recall", keys[index], values[index]) != split:
            value = str(rng.randint(1, 999))
            if value not in taken:
                taken.add(value)
                values[index] = value
    if form == "list":
        context = "List: " + ", ".join(map(" ".join, zip(keys, values, strict=True))) + "."
        turns = [(f", {keys[index]}", f" {values[index]}") for index in asked]
        turns[0] = ("\nAsk:" + turns[0][0][1:], turns[0][1])
        return Episode(context, tuple(turns))
    attribute = rng.choice(ATTRIBUTES)
    sentences = [
        f"The {attribute} of the {key} is {value}." for key, value in zip(keys, values, strict=True)
    ]
    if form == "story":
        for _ in range(max(1, facts // 2)):
            sentences.insert(rng.randint(0, len(sentences)), _filler(rng))
    return Episode(
        " ".join(sentences),
        tuple(
            (f"\nWhat is the {attribute} of the {keys[index]}?", f" {values[index]}")
            for index in asked
        ),
    )


def state_episode(rng: Random, *, split: Split, facts: int, questions: int = 1) -> Episode:
    """Values that are set again and again; the last one counts.

    ``facts`` is the number of settings, spread over about a third as many keys.
    """
    keys = rng.sample(NOUNS, max(2, min(facts // 3, len(NOUNS))))
    history = keys + [rng.choice(keys) for _ in range(max(0, facts - len(keys)))]
    rng.shuffle(history)
    asked = rng.sample(keys, min(questions, len(keys)))
    last: dict[str, str] = {}
    sentences: list[str] = []
    remaining = {key: history.count(key) for key in keys}
    for key in history:
        remaining[key] -= 1
        value = str(rng.randint(1, 999))
        if remaining[key] == 0 and key in asked:
            while split_of("state", key, value) != split:
                value = str(rng.randint(1, 999))
        verb = "is now" if key in last else "starts at"
        sentences.append(f"The {key} {verb} {value}.")
        last[key] = value
    return Episode(
        " ".join(sentences),
        tuple((f"\nWhat is the last value of the {key}?", f" {last[key]}") for key in asked),
    )


def arith_episode(rng: Random, *, split: Split, facts: int, questions: int = 1) -> Episode:
    """Sums of two values stated earlier, each from 1 to 20."""
    keys = rng.sample(NOUNS, facts)
    values = {key: rng.randint(1, 20) for key in keys}
    turns: list[tuple[str, str]] = []
    for _ in range(questions * 100):
        first, second = rng.sample(keys, 2)
        a, b = values[first], values[second]
        if split_of("arith", first, str(a), second, str(b)) == split:
            turns.append((f"\nHow much are the {first} and the {second}?", f" {a + b}"))
        if len(turns) == questions:
            break
    if not turns:
        return arith_episode(rng, split=split, facts=facts, questions=questions)
    context = " ".join(f"The {key} costs {value}." for key, value in values.items())
    return Episode(context, tuple(turns))


def copy_episode(rng: Random, *, split: Split, facts: int, questions: int = 1) -> Episode:
    """A sequence of words and numbers, then the same again; ``questions`` further repetitions.

    ``facts`` is the number of words; the first word is part of the question.
    """
    while True:
        words = [
            rng.choice(NOUNS) if rng.random() < 0.5 else str(rng.randint(1, 999))
            for _ in range(max(2, facts))
        ]
        if split_of("copy", *words) == split:
            break
    answer = "".join(" " + word for word in words[1:])
    return Episode(
        "Copy: " + " ".join(words) + ".",
        tuple((f"\nCopy: {words[0]}", answer) for _ in range(questions)),
    )


def recall(
    rng: Random, *, split: Split, facts: int = 24, form: RecallForm | None = None
) -> Generated:
    """One recall question; 24 facts are about 256 tokens. No form: sentence, pair or story."""
    chosen = rng.choice(SENTENCE_FORMS) if form is None else form
    return _single(recall_episode(rng, split=split, facts=facts, form=chosen))


def state(rng: Random, *, split: Split, facts: int = 30) -> Generated:
    """One last-value question; 30 settings are about 256 tokens."""
    return _single(state_episode(rng, split=split, facts=facts))


def arith(rng: Random, *, split: Split, facts: int = 36) -> Generated:
    """One sum over two stated prices; 36 prices are about 256 tokens."""
    return _single(arith_episode(rng, split=split, facts=facts))


def copy(rng: Random, *, split: Split, facts: int = 100) -> Generated:
    """One repetition of a sequence of words; 100 words are about 256 tokens with the answer."""
    return _single(copy_episode(rng, split=split, facts=facts))


Generator = Callable[..., Generated]

GENERATORS: dict[str, Generator] = {"recall": recall, "state": state, "arith": arith, "copy": copy}
"""By name; each takes ``(rng, *, split, facts=...)`` with about 256 tokens as its default size."""


def _single(episode: Episode) -> Generated:
    question, answer = episode.turns[0]
    return Generated(episode.context, question, answer)


def _recall_keys(rng: Random, facts: int, form: RecallForm) -> list[str]:
    if form in ("list", "sentence"):
        return rng.sample(NOUNS, facts)
    # Few adjectives and few nouns for the number of facts, so that both words are needed.
    width = max(2, int((2 * facts) ** 0.5) + 1)
    adjectives = rng.sample(ADJECTIVES, min(width, len(ADJECTIVES)))
    nouns = rng.sample(NOUNS, min(max(width, -(-facts // len(adjectives))), len(NOUNS)))
    pairs = [f"{adjective} {noun}" for adjective in adjectives for noun in nouns]
    return rng.sample(pairs, facts)


def _filler(rng: Random) -> str:
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    templates: Sequence[str] = (
        f"{name} walked to the {place}.",
        f"{name} likes the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}.",
        f"The {place} was quiet today.",
        f"{name} saw {rng.randint(1, 999)} birds near the {place}.",
        f"{name} and {rng.choice(NAMES)} met at the {place}.",
    )
    return rng.choice(templates)
