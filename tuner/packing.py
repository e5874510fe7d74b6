"""From questions and text to token sequences that can be run along.

Owns how many questions go into one sequence, which of its tokens are prompt and which positions
count. Knows nothing of policies.

What is prompt: serving prefills what a user sends and decodes what follows, one token at a time.
Here the first question, up to and including its "Answer:", is the prompt, and everything after it
is decoded, as in a conversation that goes on. A single question is short enough to be held almost
whole, and with all but the last answer in the prompt, an exact prefill would attend to everything
and evict only once, at its end; this way most answers are given by a cache that has been trimmed
for hundreds of steps, which is when a forgetting factor matters. Of running text the first quarter
is prompt, for the same reason.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from random import Random

from a2sf.errors import InvalidArgument
from a2sf.models import LoadedModel
from a2sf.teacher import Example
from tuner.datasets import Group, Part

PROMPT_SHARE_OF_TEXT = 0.25

_CHARACTERS_PER_TOKEN = 8
"""A stretch of text of this many characters a token holds enough tokens, save for odd ones."""


def examples(
    model: LoadedModel, part: Part, *, count: int, length: int, seed: int
) -> list[Example]:
    """Make up to `count` sequences of at most `length` tokens, each row of `part` used once.

    Fewer come back where the part holds no more. The seed decides which rows, in which order.
    """
    if length > model.shape.max_context:
        raise InvalidArgument(
            "length",
            f"{length} tokens, and {model.identity.id} has a context of {model.shape.max_context}",
        )
    rng = Random(f"{seed}/{part.split}")
    source = (
        _windows(model, part.text, length, rng)
        if part.groups is None
        else _packed(model, part.groups(rng), length)
    )
    return [example for _, example in zip(range(count), source, strict=False)]


def digest(made: Sequence[Example]) -> str:
    """SHA-256 (hex) over the token ids, prompts and counted positions of the examples."""
    document = [[e.token_ids, e.prompt_tokens, e.counted] for e in made]
    return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()


def _packed(model: LoadedModel, groups: Iterator[Group], length: int) -> Iterator[Example]:
    """Fill sequences with groups in order; too long a group and the unfinished end are left out."""
    room = length - len(model.encode(""))
    held: list[Group] = []
    used = 0
    for group in groups:
        text = "".join(turn.question + turn.answer for turn in group) + "\n"
        tokens = len(model.tokenizer(text, add_special_tokens=False).input_ids)
        if tokens > room:
            continue
        if used + tokens > room:
            yield _solved(model, held, length)
            held, used = [], 0
        held.append(group)
        used += tokens


def _solved(model: LoadedModel, groups: list[Group], length: int) -> Example:
    """One sequence of solved questions, a line break after each group; all answers count."""
    text = ""
    answers = []
    for group in groups:
        for turn in group:
            text += turn.question + turn.answer
            answers.append((len(text) - len(turn.answer.lstrip()), len(text)))
        text += "\n"
    ids, spans = _encode_with_spans(model, text)
    in_answer = [
        index
        for index, (start, end) in enumerate(spans[:length])
        if any(start < last and first < end for first, last in answers)
    ]
    return Example(
        token_ids=ids[:length],
        prompt_tokens=in_answer[0],
        counted=tuple(index - 1 for index in in_answer),
    )


def _encode_with_spans(
    model: LoadedModel, text: str
) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Token ids as serving makes them, and the characters that each stands for."""
    encoding = model.tokenizer(text, return_offsets_mapping=True)
    ids = model.encode(text)
    assert tuple(encoding.input_ids) == ids
    # Tokens that stand for no characters, such as the first, have empty spans.
    return ids, [(start, end) for start, end in encoding.offset_mapping]


def _windows(model: LoadedModel, text: str, length: int, rng: Random) -> Iterator[Example]:
    """Stretches of running text, from random places that do not overlap."""
    stride = length * _CHARACTERS_PER_TOKEN
    starts = list(range(0, len(text), stride))
    rng.shuffle(starts)
    for start in starts:
        # From the next line or word on, so that no word is cut.
        piece = text[start : start + stride]
        ids = model.encode(piece[_first_break(piece) :])[:length]
        if len(ids) < length:
            continue
        prompt = max(1, round(length * PROMPT_SHARE_OF_TEXT))
        yield Example(token_ids=ids, prompt_tokens=prompt, counted=tuple(range(prompt, length - 1)))


def _first_break(piece: str) -> int:
    found = [place for place in (piece.find("\n"), piece.find(" ")) if place >= 0]
    return min(found, default=-1) + 1
