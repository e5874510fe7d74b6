"""Decodes a stream of tokens to text: only whole characters, and never a part of a stop string.

Owns one stream's undecoded tokens and withheld characters, and the text of a single token. All text
comes from the tokenizer's own decoder. Knows nothing of models or caches.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from tokenizers import AddedToken, Tokenizer

_CONTEXT_TOKENS = 6
"""Number of earlier tokens that are decoded together with a new one, so that a leading space is
decoded as in the full text. An incomplete character starts within the last three of them."""

_PROMPT_TOKENS = 12
"""Number of last prompt tokens that a stream reads: for its context, and for a character that is
cut at the start of that context."""

_UNKNOWN = "\ufffd"


class Vocabulary:
    """A tokenizer's data for decoding; `vocabulary` makes one per tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        backend: Tokenizer = tokenizer.backend_tokenizer
        self.tokenizer = backend
        self.added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        """Added tokens by id; the tokenizer matches them in a text before all others."""
        self.special = {index: one.content for index, one in self.added.items() if one.special}
        """Names of special tokens by id; decoding skips special tokens."""
        self.bytes = _byte_tokens(backend)
        """Byte-fallback tokens: id -> byte."""
        letter = backend.token_to_id("<0x61>") if self.bytes else None
        # Tokens of any text: a token after them is decoded as inside a text.
        plain = backend.encode("a", add_special_tokens=False).ids
        self.before: list[int] = plain if letter is None else [letter]
        """A neutral context, for tokens that must be decoded without their predecessors."""

    def is_text(self, token_id: int) -> bool:
        """Whether the token has text: it exists and is not special."""
        return token_id not in self.special and self.tokenizer.id_to_token(token_id) is not None

    def special_named(self, texts: Sequence[str]) -> dict[int, str]:
        """Return the special tokens whose names are in `texts`: id -> name."""
        return {index: name for index, name in self.special.items() if name in texts}

    def token_text(self, token_id: int) -> str:
        """Return a token's text inside a text; an incomplete character is U+FFFD.

        The text of a special token is its name; that of an unknown id is empty.
        """
        alone = self.tokenizer.decode([token_id], skip_special_tokens=False)
        if token_id in self.added or token_id in self.bytes:
            return alone
        before = self.tokenizer.decode(self.before, skip_special_tokens=False)
        both = self.tokenizer.decode([*self.before, token_id], skip_special_tokens=False)
        return both[len(before) :] if both.startswith(before) else alone


@lru_cache(maxsize=8)
def vocabulary(tokenizer: Any) -> Vocabulary:
    """Return the decoding data of a transformers fast tokenizer, cached."""
    return Vocabulary(tokenizer)


def _byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    letter = tokenizer.token_to_id("<0x61>")
    # A vocabulary may have such tokens although its decoder does not support byte fallback.
    if letter is None or tokenizer.decode([letter]) != "a":
        return {}
    found = {tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    return {index: byte for index, byte in found.items() if index is not None}


class _Decoder:
    """Decodes tokens one by one; the pieces join to the tokenizer's decoding of all tokens.

    There is one exception, with byte fallback: if one byte of a run is invalid, the tokenizers
    library replaces every byte of the run by U+FFFD. Here, characters that were complete before the
    invalid byte are kept.

    The text of a token depends on its neighbours. So we decode it together with the tokens before
    it, and remove the text of those (as text-generation-inference and vLLM do). The tokenizers
    library's own stream decoder raises an error for invalid bytes.
    """

    def __init__(self, known: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self._vocabulary = known
        self._context: list[int] = []
        self._context_text = ""
        """The text of the context."""
        self._incomplete = False
        """Whether U+FFFD at its end is withheld, because it may become a character."""
        self._byte_run: list[int] = []
        """Byte tokens of an incomplete character."""
        self._prompt_bytes = 0
        """Number of those that belong to the prompt."""
        texts = (i for i in reversed(prompt_ids) if known.is_text(i))
        for token_id in reversed([*islice(texts, _PROMPT_TOKENS)]):
            self.push(token_id)
        self._prompt_bytes = len(self._byte_run)
        # An incomplete character of the prompt is not part of the completion.
        self._incomplete = False

    def push(self, token_id: int) -> str:
        """Add one token; return the text that is now complete."""
        if not self._vocabulary.is_text(token_id):
            return ""
        if token_id not in self._vocabulary.bytes:
            return self._replace_invalid(len(self._byte_run)) + self._decode_next([token_id])
        self._byte_run.append(token_id)
        text = ""
        while self._byte_run:
            run = bytes(self._vocabulary.bytes[i] for i in self._byte_run)
            try:
                run.decode()
            except UnicodeDecodeError as error:
                # Until now the run was the start of a character. So it is either still incomplete
                # or invalid from its first byte.
                if error.end == len(run) and error.reason == "unexpected end of data":
                    break
                text += self._replace_invalid(error.end)
            else:
                text += self._decode_next(self._byte_run)
                self._byte_run, self._prompt_bytes = [], 0
                self._reset_context()
        return text

    def flush(self) -> str:
        """Return the withheld text at the end; an incomplete character becomes U+FFFD."""
        text = self._replace_invalid(len(self._byte_run)) + _UNKNOWN * self._incomplete
        self._incomplete = False
        return text

    def _replace_invalid(self, count: int) -> str:
        """Drop `count` invalid bytes from the run; return one U+FFFD for each, as the library."""
        if not count:
            return ""
        del self._byte_run[:count]
        own = max(count - self._prompt_bytes, 0)
        self._prompt_bytes = max(self._prompt_bytes - count, 0)
        self._reset_context()
        return _UNKNOWN * own

    def _reset_context(self) -> None:
        """Start a new context: bytes in the current one would join with new bytes."""
        self._context = [*self._vocabulary.before]
        self._context_text = self._decode(self._context)

    def _decode_next(self, token_ids: list[int]) -> str:
        together = [*self._context, *token_ids]
        text = self._decode(together)
        settled = self._context_text[:-1] if self._incomplete else self._context_text
        piece = text[_shared(settled, text) :]
        # Byte-level decoders return one U+FFFD for an incomplete character. With byte fallback,
        # U+FFFD here is real text.
        self._incomplete = piece.endswith(_UNKNOWN) and not self._vocabulary.bytes
        if len(together) > 2 * _CONTEXT_TOKENS:
            together = together[-_CONTEXT_TOKENS:]
            text = self._decode(together)
        self._context, self._context_text = together, text
        return piece[:-1] if self._incomplete else piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._vocabulary.tokenizer.decode(token_ids, skip_special_tokens=True)


class TextStream:
    """Decodes one completion token by token.

    `push` returns the text that can be sent. It withholds incomplete characters and any text that
    may be the start of a stop string. A stop string that is complete within the first
    `min_new_tokens` tokens is ordinary text.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        min_new_tokens: int = 0,
    ) -> None:
        self._decoder = _Decoder(vocabulary(tokenizer), prompt_ids)
        self._stop = tuple(stop)
        self._withheld = ""
        self._tokens_without_stop = min_new_tokens
        """Number of next tokens that cannot complete a stop string."""
        self.matched: str | None = None
        """The matched stop string; after a match, `push` must not be called."""

    def push(self, token_id: int) -> str:
        """Add one token; return the text that can be sent, up to a stop string if one matches."""
        assert self.matched is None, "the stream has ended"
        self._tokens_without_stop -= 1
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """Return the withheld text at the stream's end; an incomplete character becomes U+FFFD."""
        if self.matched is not None:
            return ""
        text = self._release(self._decoder.flush())
        if self.matched is None:
            text, self._withheld = text + self._withheld, ""
        return text

    def _release(self, piece: str) -> str:
        if not piece:
            return ""
        text = self._withheld + piece
        if self._tokens_without_stop < 0:
            # Ignore matches that end within the withheld text: min_new_tokens excluded them.
            ends = len(self._withheld) + 1
            places = [(text.find(stop, max(ends - len(stop), 0)), stop) for stop in self._stop]
            found = [(at, stop) for at, stop in places if at >= 0]
            if found:
                # The match that starts first wins; on a tie, the stop string listed first.
                at, self.matched = min(found, key=lambda match: match[0])
                self._withheld = ""
                return text[:at]
        longest = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._withheld = text[len(text) - longest :]
        return text[: len(text) - longest]


def _shared(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    if other.startswith(one):
        return len(one)
    return next(i for i, (a, b) in enumerate(zip(one, f"{other}\0", strict=False)) if a != b)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
