"""Packs questions and text into token sequences.

Owns how many questions go into one sequence, which of its tokens are prompt, which positions count,
and the position of each answer. Knows nothing of policies.

Which tokens are prompt: serving prefills the user's text and decodes the rest, one token at a time.
Rows come in two forms. In *packed* rows the first question, up to and including its "Answer:", is
the prompt, and everything after it is decoded, as in a long conversation. A single question is
short enough to be kept almost whole. If all but the last answer were prompt, an exact prefill would
attend to everything and evict only once, at its end. In packed rows, most answers come from a cache
that has been trimmed for hundreds of steps; only then does a forgetting factor matter. With a
number of *shots*, a sequence is one question after this many solved ones, and everything but the
answer is prompt, as in the literature. A generated context with its questions is one sequence in
both forms, as long as it fits. Conversations, rendered by the model's chat template, share
sequences as questions do. Of running text the first quarter is prompt.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.offline.teacher_forcing import Example
from tuner.data.chats import turns_of
from tuner.data.parts import Group, Part

PROMPT_SHARE_OF_TEXT = 0.25

MIN_FACTS = 2

_CHARACTERS_PER_TOKEN = 8
"""Characters taken per token wanted; only rare texts then hold too few tokens."""


@dataclass(frozen=True)
class Item:
    """A sequence, and the answers in it that can be judged right or wrong."""

    example: Example
    answers: tuple[range, ...] = ()
    """The range of `example.counted` that predicts each answer, in order; empty if the answers are
    too free to be compared word by word."""
    alternatives: tuple[Example, ...] = ()
    """The sequence with each choice for its last answer; the counted positions predict the
    choice."""
    right: int = 0
    """The index of the right alternative."""


def items(
    model: LoadedModel,
    part: Part,
    *,
    count: int,
    length: int,
    seed: int,
    shots: int | None = None,
    solved: Part | None = None,
) -> list[Item]:
    """Make up to `count` sequences of at most `length` tokens, each row of `part` used once.

    Args:
        model: its tokenizer counts the tokens.
        part: source of questions or text.
        count: number of sequences; fewer are returned if the part holds no more.
        length: largest number of tokens of one sequence.
        seed: decides which rows, in which order.
        shots: solved examples before each question; None packs as many rows as fit.
        solved: source of the solved examples; needed with one shot or more.
    """
    if length > model.shape.max_context:
        raise InvalidArgument(
            "length",
            f"{length} tokens, and {model.identity.id} has a context of {model.shape.max_context}",
        )
    rng = Random(f"{seed}/{part.split}")
    if part.generate is not None:
        source = _generated(model, part, length, rng, shots or 0, solved)
    elif part.conversations is not None:
        if shots:
            raise InvalidArgument(
                "shots", f"{shots}; accepted for conversations: 0, or leave it out"
            )
        conversations = (turns_of(model, one, length) for one in part.conversations(rng))
        groups = (group for group in conversations if group)
        # The template already contains the special tokens.
        if shots is None:
            source = _packed(model, groups, length, special=False)
        else:
            source = (_item(model, [group], num_solved=0, special=False) for group in groups)
    elif part.groups is None:
        if shots is not None:
            raise InvalidArgument("shots", "running text has no questions; leave it out for text")
        source = (Item(example) for example in _windows(model, part.text, length, rng))
    elif shots is None:
        source = _packed(model, part.groups(rng), length)
    else:
        source = _with_shots(model, part, length, rng, shots, solved)
    return [item for _, item in zip(range(count), source, strict=False)]


def examples(
    model: LoadedModel, part: Part, *, count: int, length: int, seed: int
) -> list[Example]:
    """Make the sequences of `items`, packed."""
    made = items(model, part, count=count, length=length, seed=seed)
    return [item.example for item in made]


def digest(made: Sequence[Example]) -> str:
    """SHA-256 (hex) over the token ids, prompts and counted positions of the examples."""
    document = [[e.token_ids, e.prompt_tokens, e.counted] for e in made]
    return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()


def _packed(
    model: LoadedModel, groups: Iterator[Group], length: int, *, special: bool = True
) -> Iterator[Item]:
    """Fill sequences with groups in order; omit groups that are too long, and an unfinished end."""
    room = length - len(model.encode("", special=special))
    pending: list[Group] = []
    tokens_used = 0
    for group in groups:
        tokens = _max_tokens(model, group)
        if tokens > room:
            continue
        if tokens_used + tokens > room:
            yield _item(model, pending, num_solved=0, special=special)
            pending, tokens_used = [], 0
        pending.append(group)
        tokens_used += tokens


def _with_shots(
    model: LoadedModel, part: Part, length: int, rng: Random, shots: int, solved: Part | None
) -> Iterator[Item]:
    """Make one sequence per group, after `shots` solved ones; omit what is too long."""
    assert part.groups is not None
    solved_examples = _solved_examples(model, solved, length, rng, shots)
    room = length - len(model.encode(""))
    for group in part.groups(rng):
        lead = list(islice(solved_examples, shots))
        if len(lead) < shots:
            return
        if sum(_max_tokens(model, one) for one in (*lead, group)) <= room:
            yield _item(model, [*lead, group], num_solved=shots, with_choices=True)


def _solved_examples(
    model: LoadedModel, solved: Part | None, length: int, rng: Random, shots: int
) -> Iterator[Group]:
    """Yield solved examples endlessly, none so long that a question would not fit beside them."""
    if not shots:
        return
    assert solved is not None
    assert solved.groups is not None
    room = length // (shots + 1)
    short = [group for group in solved.groups(rng) if _max_tokens(model, group) <= room]
    while short:
        yield from short
        rng.shuffle(short)


def _generated(
    model: LoadedModel, part: Part, length: int, rng: Random, shots: int, solved: Part | None
) -> Iterator[Item]:
    """Make contexts of as many facts as fit, each from a separate random seed."""
    assert part.generate is not None
    parts = [*[solved] * shots, part]
    while True:
        seed = rng.getrandbits(64)

        def groups(facts: int, seed: int = seed) -> list[Group]:
            item_rng = Random(seed)
            return [
                one.generate(item_rng, facts) for one in parts if one is not None and one.generate
            ]

        low, high = MIN_FACTS - 1, part.max_facts
        while low < high:
            facts = (low + high + 1) // 2
            if len(model.encode(_text(groups(facts)))) <= length:
                low = facts
            else:
                high = facts - 1
        if low < MIN_FACTS:
            return
        yield _item(model, groups(low), num_solved=shots)


def _text(groups: Sequence[Group]) -> str:
    """Join the turns of groups in order; after each group comes the `after` of its last turn."""
    return "".join(
        "".join(turn.question + turn.answer for turn in group) + group[-1].after for group in groups
    )


def _max_tokens(model: LoadedModel, group: Group) -> int:
    """Tokens of a group with the longest choice for its last answer, without added ones."""
    last = group[-1]
    text = _text([group]).removesuffix(last.answer + last.after)
    return max(
        len(model.encode(f"{text}{answer}{last.after}", special=False))
        for answer in dict.fromkeys((last.answer, *last.choices))
    )


def _item(
    model: LoadedModel,
    groups: Sequence[Group],
    *,
    num_solved: int,
    with_choices: bool = False,
    special: bool = True,
) -> Item:
    """Make one sequence; every answer after the first `num_solved` groups counts.

    With `with_choices`, the choices for the last answer, if any, become alternatives. Without
    `special`, the text already contains the special tokens: these are conversations, whose answers
    are free.
    """
    text, spans = _text(groups[:num_solved]), []
    for group in groups[num_solved:]:
        for turn in group:
            text += turn.question + turn.answer
            spans.append((len(text) - len(turn.answer.lstrip()), len(text)))
        text += group[-1].after
    example, answers = _example(model, text, spans, first=spans[0][0], special=special)
    # A solution in many lines is one of many right ones, so its exact words are no measure.
    free_form = not special or any("\n" in turn.answer for group in groups for turn in group)
    last = groups[-1][-1]
    before = text[: spans[-1][1] - len(last.answer)]
    alternatives = []
    for choice in last.choices if with_choices else ():
        choice_text = before + choice
        span = (len(choice_text) - len(choice.lstrip()), len(choice_text))
        alternatives.append(_example(model, choice_text, [span], first=spans[0][0])[0])
    return Item(
        example=example,
        answers=() if free_form else answers,
        alternatives=tuple(alternatives),
        right=last.choices.index(last.answer) if alternatives else 0,
    )


def _example(
    model: LoadedModel,
    text: str,
    spans: Sequence[tuple[int, int]],
    *,
    first: int,
    special: bool = True,
) -> tuple[Example, tuple[range, ...]]:
    """Encode a text; its prompt ends at character `first`, and tokens of each span count."""
    encoding = model.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    ids = model.encode(text, special=special)
    # `encode` leaves out the tokenizer's own BOS token before a text that begins with one.
    added = len(encoding.input_ids) - len(ids)
    assert tuple(encoding.input_ids[added:]) == ids
    # Tokens without characters, such as an added BOS token, have empty spans.
    places = [(start, end) for start, end in encoding.offset_mapping[added:]]
    counted: list[int] = []
    answers = []
    for low, high in spans:
        inside = [i for i, (start, end) in enumerate(places) if start < high and low < end]
        answers.append(range(len(counted), len(counted) + len(inside)))
        counted += [index - 1 for index in inside]
    prompt = next(i for i, (start, end) in enumerate(places) if end > first and end > start)
    return Example(token_ids=ids, prompt_tokens=prompt, counted=tuple(counted)), tuple(answers)


def _windows(model: LoadedModel, text: str, length: int, rng: Random) -> Iterator[Example]:
    """Yield pieces of running text from random places that do not overlap."""
    stride = length * _CHARACTERS_PER_TOKEN
    starts = list(range(0, len(text), stride))
    rng.shuffle(starts)
    for start in starts:
        # Begins at the next line or word, so that no word is cut.
        piece = text[start : start + stride]
        ids = model.encode(piece[_first_break(piece) :])[:length]
        if len(ids) < length:
            continue
        prompt = max(1, round(length * PROMPT_SHARE_OF_TEXT))
        yield Example(token_ids=ids, prompt_tokens=prompt, counted=tuple(range(prompt, length - 1)))


def _first_break(piece: str) -> int:
    found = [place for place in (piece.find("\n"), piece.find(" ")) if place >= 0]
    return min(found, default=-1) + 1
