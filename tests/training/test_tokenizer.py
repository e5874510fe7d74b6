"""The shipped tokenizer: nothing is lost, nothing is unknown, numbers are single tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from a2sf import reference
from tuner.data.generated import ADJECTIVES, ATTRIBUTES, NAMES, NOUNS, PLACES

TOKENIZER = Tokenizer.from_file(str(reference.path() / "tokenizer.json"))


def ids(text: str) -> list[int]:
    encoded: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return encoded


@given(st.text())
def test_any_text_comes_back_exactly(text: str) -> None:
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["007", "1234567", "a1b22c333", "😀é\u200b\n\r\n\t  x", "<unk>"])
def test_awkward_text_comes_back_exactly(text: str) -> None:
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


def test_every_number_up_to_999_is_one_token_with_and_without_a_space() -> None:
    bare = [ids(str(n)) for n in range(1000)]
    spaced = [ids(f" {n}") for n in range(1000)]
    assert {len(tokens) for tokens in bare + spaced} == {1}
    assert len({tokens[0] for tokens in bare + spaced}) == 2000


def test_every_word_of_the_generators_is_one_token_after_a_space() -> None:
    for word in (*NOUNS, *ADJECTIVES, *NAMES, *PLACES, *ATTRIBUTES):
        assert len(ids(f" {word}")) == 1, word


def test_a_document_begins_with_bos() -> None:
    assert TOKENIZER.encode("Once").ids == [TOKENIZER.token_to_id("<|bos|>"), *ids("Once")]
    assert TOKENIZER.token_to_id("<|bos|>") == 0
    assert TOKENIZER.token_to_id("<|eos|>") == 1
    assert TOKENIZER.get_vocab_size() == 4096
