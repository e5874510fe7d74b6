"""Generates questions whose answers are in their own context: recall, state, arith, copy.

Owns the wording, the sizes and the splits. A stable hash of the asked content decides the only
split in which it is asked. So a pair asked in validation is never asked in train, whatever the
seeds. Facts that are only stated may occur in any split. Knows nothing of tokenizers or models.

Every number is an integer from 1 to 999, one token for the reference model's tokenizer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Literal, get_args

Split = Literal["train", "calibration", "validation"]
RecallForm = Literal["list", "sentence", "pair", "story", "talk"]

RECALL_FORMS: tuple[RecallForm, ...] = get_args(RecallForm)
StateForm = Literal["value", "held", "counter"]
STATE_FORMS: tuple[StateForm, ...] = get_args(StateForm)

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
class Episode:
    """Several questions asked one after another about one context.

    Each turn is ``(question, answer)``; a reader sees the earlier turns before a later one. An
    answer begins with a space, because it follows the question.
    """

    context: str
    turns: tuple[tuple[str, str], ...]


def split_of(*content: str) -> Split:
    """Return the only split that may ask this content: 10 % validation, 10 % calibration."""
    bucket = zlib.crc32("\x1f".join(content).encode()) % 20
    if bucket < 2:
        return "validation"
    return "calibration" if bucket < 4 else "train"


def recall_episode(
    rng: Random, *, split: Split, facts: int, questions: int = 1, form: RecallForm = "talk"
) -> Episode:
    """State each fact once, and ask some of the facts in random order, without repetition.

    Forms: ``list`` (only ``lamp 412``), ``sentence`` (one noun per fact), ``pair`` (adjective and
    noun, each shared with other facts, so that one word alone does not identify the fact),
    ``story`` (pairs between sentences without facts, some of them with other numbers) and ``talk``
    (pairs in a conversation that has already asked, in another order, for everything that will be
    asked). Only ``talk`` indicates before a question what will be asked. At most 120 facts in the
    one-word forms and 999 in the others.
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
    context = " ".join(sentences)
    turns = [
        (f"\nWhat is the {attribute} of the {keys[index]}?", f" {values[index]}") for index in asked
    ]
    if form == "talk":
        context += "".join(question + answer for question, answer in rng.sample(turns, questions))
    return Episode(context, tuple(turns))


def state_episode(
    rng: Random, *, split: Split, facts: int, questions: int = 1, form: StateForm | None = None
) -> Episode:
    """Make states that change repeatedly, and ask for the final ones.

    Forms: ``value`` (a number is replaced), ``held`` (a person takes one thing after another) and
    ``counter`` (a number changes by one, and is stated only at the start). No form: a random one.
    ``facts`` is the number of statements, about three per key.
    """
    chosen = rng.choice(STATE_FORMS) if form is None else form
    pool = NAMES if chosen == "held" else NOUNS
    keys = rng.sample(pool, max(2, min(facts // 3, len(pool))))
    history = keys + [rng.choice(keys) for _ in range(max(0, facts - len(keys)))]
    rng.shuffle(history)
    asked = rng.sample(keys, min(questions, len(keys)))
    course = {
        key: _course(rng, chosen, key, history.count(key), split if key in asked else None)
        for key in keys
    }
    statements = {key: iter(sentences) for key, (sentences, _) in course.items()}
    question = {
        "value": "What is the last value of the {}?",
        "held": "What did {} take last?",
        "counter": "How many coins are in the {}?",
    }[chosen]
    return Episode(
        " ".join(next(statements[key]) for key in history),
        tuple(("\n" + question.format(key), f" {course[key][1]}") for key in asked),
    )


def arith_episode(rng: Random, *, split: Split, facts: int, questions: int = 1) -> Episode:
    """Make sums of two values stated earlier, each from 1 to 20; the answer is the whole equation.

    At most as many questions as facts.
    """
    questions = min(questions, facts)
    keys = rng.sample(NOUNS, facts)
    values = {key: rng.randint(1, 20) for key in keys}
    turns: list[tuple[str, str]] = []
    for _ in range(questions * 100):
        first, second = rng.sample(keys, 2)
        a, b = values[first], values[second]
        if split_of("arith", first, str(a), second, str(b)) == split:
            question = f"\nHow much are the {first} and the {second}?"
            turns.append((question, f" {a} + {b} = {a + b}"))
        if len(turns) == questions:
            break
    if not turns:
        return arith_episode(rng, split=split, facts=facts, questions=questions)
    context = " ".join(f"The {key} costs {value}." for key, value in values.items())
    return Episode(context, tuple(turns))


def copy_episode(rng: Random, *, split: Split, facts: int, questions: int = 1) -> Episode:
    """Make a sequence of words and numbers, and the same again; ``questions`` further repetitions.

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


def _course(
    rng: Random, form: StateForm, key: str, times: int, split: Split | None
) -> tuple[list[str], str]:
    """Return the statements about one key, in order, and the final state.

    The final state belongs to `split`, unless `split` is None.
    """
    for attempt in count():
        if form == "value":
            states = [str(rng.randint(1, 999)) for _ in range(times)]
            sentences = [f"The {key} starts at {states[0]}."]
            sentences += [f"The {key} is now {state}." for state in states[1:]]
        elif form == "held":
            states = rng.sample(NOUNS, times)
            sentences = [f"{key} took the {state}." for state in states]
        else:
            moves = [rng.choice((-1, 1)) for _ in range(times - 1)]
            # Small numbers if possible; larger ones if this key has no small number in the split.
            start = rng.randint(times, 20 + times + attempt)
            states = [str(start + sum(moves))]
            sentences = [f"The {key} holds {start} coins."]
            sentences += [
                f"The {key} {'gains' if move > 0 else 'loses'} one coin." for move in moves
            ]
        if split is None or split_of("state", key, states[-1]) == split:
            break
    return sentences, states[-1]


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
