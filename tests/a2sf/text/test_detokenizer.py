"""Streamed text has whole characters and no stop string, for any tokens."""

import codecs
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from a2sf.text.detokenizer import TextStream, vocabulary
from tests.tiny import byte_tokenizer
from tests.tiny_tokenizers import KINDS, byte_fallback

TOKENIZER = byte_tokenizer()


def stream_of(
    ids: list[int], stop: tuple[str, ...] = (), min_new_tokens: int = 0
) -> tuple[str, list[str], str | None]:
    stream = TextStream(TOKENIZER, TOKENIZER("prompt ").input_ids, stop, min_new_tokens)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.matched is not None:
            break
    pieces.append(stream.flush())
    return "".join(pieces), pieces, stream.matched


@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_never_split_a_character(text: str) -> None:
    joined, pieces, matched = stream_of(TOKENIZER(text).input_ids)
    assert joined == text
    assert matched is None
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(
    st.text(alphabet="abé ", max_size=30),
    st.lists(st.text(alphabet="abé ", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_ends_the_text_before_it_and_never_leaks(text: str, stop: list[str]) -> None:
    joined, _, matched = stream_of(TOKENIZER(text).input_ids, tuple(stop))
    places = [text.find(s) for s in stop if s in text]
    if not places:
        assert (joined, matched) == (text, None)
        return
    assert matched in stop
    # The stream ends at the first token that completes a stop string.
    ends = min(text.find(s) + len(s) for s in stop if s in text)
    assert text.startswith(joined + matched)
    assert len(joined + matched) == ends
    assert not any(s in joined for s in stop)


@settings(max_examples=300)
@given(
    st.text(alphabet="abé", max_size=20),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    st.integers(0, 20),
)
@example("aab", ["ab", "aab"], 2)  # "ab" ends after the second token, so it counts
@example("xab!", ["ab", "xab!"], 3)  # "ab" ends too early, "xab!" does not
def test_a_stop_string_counts_only_after_min_new_tokens(
    text: str, stop: list[str], min_new_tokens: int
) -> None:
    tokens = TOKENIZER(text).input_ids
    joined, _, matched = stream_of(tokens, tuple(stop), min_new_tokens)
    for end in range(1, len(text) + 1):
        # A character is complete after the last of its tokens.
        read = text[:end]
        found = [s for s in stop if read.endswith(s)]
        if found and len(TOKENIZER(read).input_ids) > min_new_tokens:
            assert matched == max(found, key=len)
            assert joined + matched == read
            return
    assert (joined, matched) == (text, None)


BYTE_FALLBACK = KINDS["byte_fallback"]
WITH_BYTES = [kind for kind in KINDS if kind.startswith("byte_fallback")]
WITHOUT_BYTES = [kind for kind in KINDS if kind not in WITH_BYTES]

codecs.register_error("each byte", lambda e: ("\ufffd" * (e.end - e.start), e.end))  # type: ignore[attr-defined]


def byte_ids(data: bytes | str) -> list[int]:
    raw = data.encode() if isinstance(data, str) else data
    return [BYTE_FALLBACK.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in raw]


def word_ids(*names: str) -> list[int]:
    return [BYTE_FALLBACK.convert_tokens_to_ids(name) for name in names]


def pieces_of(tokenizer: Any, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt, ())
    return [*(stream.push(token) for token in ids), stream.flush()]


def at_once(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The tokenizer's decoding of `ids` after a prompt: the text that they add."""
    before = tokenizer.backend_tokenizer.decode(prompt)
    both: str = tokenizer.backend_tokenizer.decode([*prompt, *ids])
    shared = (i for i, (a, b) in enumerate(zip(before, both, strict=False)) if a != b)
    return both[next(shared, min(len(before), len(both))) :]


def by_characters(tokenizer: Any, ids: list[int]) -> str:
    """The decoding of tokens after a text, with U+FFFD for each byte outside any character."""
    text, run = "", b""
    for token in ids:
        name = tokenizer.convert_ids_to_tokens(token)
        if name in ("<s>", "</s>", "<|turn|>", "<|end|>"):
            continue
        if name.startswith("<0x"):
            run += bytes([int(name[1:-1], 16)])
            continue
        text += run.decode(errors="each byte") + name.replace("▁", " ")
        run = b""
    return text + run.decode(errors="each byte")


@pytest.mark.parametrize("kind", WITHOUT_BYTES)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_tokenizer_s_decoding_of_all_tokens(
    kind: str, data: st.DataObject
) -> None:
    tokenizer = KINDS[kind]
    # A few more ids than tokens, because models have padded vocabularies.
    ids = st.lists(st.integers(0, len(tokenizer) + 3), max_size=40)
    prompt, new = data.draw(ids), data.draw(ids)
    joined = "".join(pieces_of(tokenizer, prompt, new))
    assert joined == at_once(tokenizer, prompt, new)


@pytest.mark.parametrize("kind", WITH_BYTES)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
@example(data=None)
def test_byte_tokens_in_any_order_keep_every_whole_character(
    kind: str, data: st.DataObject | None
) -> None:
    tokenizer = KINDS[kind]
    ids = [*byte_ids("你"), *byte_ids(b"\xe5"), *word_ids("▁hi")]
    if data is not None:
        a_byte = st.sampled_from(byte_ids("\0ahé你😀") + byte_ids(bytes(range(0x80, 256, 5))))
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1) | a_byte, max_size=40))
    joined = "".join(pieces_of(tokenizer, tokenizer("hi there").input_ids, ids))
    assert joined == by_characters(tokenizer, ids)


@pytest.mark.parametrize("kind", WITH_BYTES)
@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from([*"é你😀", b"\xe5", b"\xff\x80", b"\xf0\x9f\x98", "hi", "▁", "▁there"]),
        max_size=12,
    )
)
def test_valid_or_invalid_byte_runs_equal_the_tokenizer_s_decoding(
    kind: str, parts: list[str | bytes]
) -> None:
    tokenizer = KINDS[kind]
    ids: list[int] = []
    for part in parts:
        known = isinstance(part, str) and part in tokenizer.get_vocab()
        # Followed by a word, because the tokenizer decodes a run of bytes together.
        ids += word_ids(str(part)) if known else [*byte_ids(part), *word_ids("b")]
    prompt = tokenizer("hi there").input_ids
    assert "".join(pieces_of(tokenizer, prompt, ids)) == at_once(tokenizer, prompt, ids)


def test_an_invalid_byte_does_not_affect_the_text_around_it() -> None:
    ids = [*byte_ids("你"), *byte_ids(b"\xe5"), *word_ids("▁hi")]
    pieces = pieces_of(BYTE_FALLBACK, BYTE_FALLBACK("hi").input_ids, ids)
    assert pieces == ["", "", "你", "", "\ufffd hi", ""]


@pytest.mark.parametrize("prompt", ["hi 😀😀", "😀😀😀", "hi", "a"])
def test_the_first_new_word_keeps_the_space_before_it(prompt: str) -> None:
    ids = BYTE_FALLBACK(prompt).input_ids
    assert "".join(pieces_of(BYTE_FALLBACK, ids, word_ids("▁hi"))) == " hi"


def test_after_only_control_tokens_a_text_starts_without_a_space() -> None:
    begin = [BYTE_FALLBACK.bos_token_id]
    assert "".join(pieces_of(BYTE_FALLBACK, begin, word_ids("▁hi", "▁there"))) == "hi there"


@pytest.mark.parametrize(
    ("tokenizer", "cut"),
    [(TOKENIZER, TOKENIZER("☃").input_ids), (BYTE_FALLBACK, byte_ids("☃"))],
)
def test_a_character_that_starts_in_the_prompt_is_returned_whole(
    tokenizer: Any, cut: list[int]
) -> None:
    letter = tokenizer.convert_tokens_to_ids("a")
    prompt = [letter, *cut[:2]]
    assert pieces_of(tokenizer, prompt, [cut[2], letter]) == ["☃", "a", ""]
    # Otherwise the incomplete character belongs to the prompt.
    assert pieces_of(tokenizer, prompt, [letter]) == ["a", ""]


def test_an_incomplete_character_at_the_end_is_returned() -> None:
    assert pieces_of(TOKENIZER, [65], TOKENIZER("☃").input_ids[:2]) == ["", "", "\ufffd"]
    assert pieces_of(BYTE_FALLBACK, word_ids("a"), byte_ids("☃")[:2]) == ["", "", "\ufffd\ufffd"]


@pytest.mark.parametrize("kind", ["byte_level", "words"])
def test_a_real_replacement_character_at_the_end_is_sent(kind: str) -> None:
    tokenizer = KINDS[kind]
    prompt, ids = tokenizer("hi").input_ids, tokenizer("\ufffd").input_ids
    assert "".join(pieces_of(tokenizer, prompt, ids)).strip() == "\ufffd"
    assert "".join(pieces_of(tokenizer, prompt, ids * 9)).count("\ufffd") == 9


def test_invalid_bytes_are_not_withheld_for_long() -> None:
    # Each byte is returned when the next one arrives.
    wrong = TOKENIZER.convert_tokens_to_ids("ÿ")
    assert pieces_of(TOKENIZER, [65], [wrong] * 50) == ["", *["\ufffd"] * 50]
    assert pieces_of(BYTE_FALLBACK, [1], byte_ids(b"\xff") * 50) == [*["\ufffd"] * 50, ""]


def test_the_text_of_a_single_token_is_that_inside_a_text() -> None:
    texts = [vocabulary(BYTE_FALLBACK).token_text(i) for i in word_ids("▁hi", "hi", "▁", "</s>")]
    assert texts == [" hi", "hi", " ", "</s>"]
    assert [vocabulary(BYTE_FALLBACK).token_text(i) for i in byte_ids("a☃")] == ["a", *"\ufffd" * 3]
    word = KINDS["word_pieces"]
    part, whole = word.convert_tokens_to_ids(["##hi", "hi"])
    assert [vocabulary(word).token_text(i) for i in (part, whole)] == ["hi", " hi"]
    assert vocabulary(word).token_text(len(word)) == ""


def test_names_of_byte_tokens_without_a_byte_decoder_are_plain_text() -> None:
    tokenizer = byte_fallback()
    tokenizer.backend_tokenizer.decoder = KINDS["metaspace_unigram"].backend_tokenizer.decoder
    joined = "".join(pieces_of(tokenizer, word_ids("▁hi"), byte_ids("é")))
    assert joined == "<0xC3><0xA9>"
