"""Text comes out whole: every character, no stop string, whatever the tokens."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from a2sf.text import TextStream
from tests.tiny import EOS, byte_tokenizer

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
def test_the_pieces_join_to_the_text_and_never_split_a_character(text: str) -> None:
    joined, pieces, matched = stream_of(TOKENIZER(text).input_ids)
    assert joined == text
    assert matched is None
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, EOS), max_size=30))
def test_any_tokens_at_all_decode_as_they_would_at_once(ids: list[int]) -> None:
    joined, _, _ = stream_of(ids)
    at_once = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert joined.replace("\ufffd", "") == at_once.replace("\ufffd", "")


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
@example("aab", ["ab", "aab"], 2)  # "ab" begins before the second token ends and counts
@example("xab!", ["ab", "xab!"], 3)  # "ab" is complete too early, what holds it is not
def test_a_stop_string_counts_once_a_token_after_the_first_few_completes_it(
    text: str, stop: list[str], min_new_tokens: int
) -> None:
    tokens = TOKENIZER(text).input_ids
    joined, _, matched = stream_of(tokens, tuple(stop), min_new_tokens)
    for end in range(1, len(text) + 1):
        # A character is settled by the last of its tokens.
        read = text[:end]
        found = [s for s in stop if read.endswith(s)]
        if found and len(TOKENIZER(read).input_ids) > min_new_tokens:
            assert matched == max(found, key=len)
            assert joined + matched == read
            return
    assert (joined, matched) == (text, None)


def test_a_prompt_that_ends_within_a_character_does_no_harm() -> None:
    snowman = TOKENIZER("\u2603").input_ids
    stream = TextStream(TOKENIZER, [*TOKENIZER("a").input_ids, *snowman[:2]], ())
    out = stream.push(snowman[2]) + "".join(stream.push(t) for t in TOKENIZER("xyz").input_ids)
    assert (out + stream.flush()).endswith("xyz")
