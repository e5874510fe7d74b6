"""From tokens to text, as they come: whole characters only, and stop strings never leak.

Owns one stream's undecoded tokens and withheld characters, and what a token reads as by itself.
All text comes from the tokenizer's own decoder. Knows nothing of models or caches.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from tokenizers import AddedToken, Tokenizer

_CONTEXT_TOKENS = 6
"""Earlier tokens that the decoder sees first, so that a leading space is decoded as in the full
text. An unfinished character begins in the last three of them at the earliest."""

_PROMPT_TOKENS = 12
"""Tokens of the prompt's end that a stream reads: those of a context, and of characters cut by
where it begins."""

_UNKNOWN = "\ufffd"


class Vocabulary:
    """What decoding needs to know of a tokenizer; made once for each by `vocabulary`."""

    def __init__(self, tokenizer: Any) -> None:
        backend: Tokenizer = tokenizer.backend_tokenizer
        self.tokenizer = backend
        self.added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        """The tokens that are looked for in a text before anything else, by id."""
        self.special = {index: one.content for index, one in self.added.items() if one.special}
        """Those that are control, never text: decoding leaves them out."""
        self.bytes = _byte_tokens(backend)
        """The tokens that stand for one byte each where characters fall back on their bytes."""
        letter = backend.token_to_id("<0x61>") if self.bytes else None
        # Of any text that is not empty: what follows it is decoded as within a text.
        plain = backend.encode("a", add_special_tokens=False).ids
        self.before: list[int] = plain if letter is None else [letter]
        """A context for a token of which the one before is not to be shown to the decoder."""

    def is_text(self, token_id: int) -> bool:
        """Whether decoding makes anything of the token."""
        return token_id not in self.special and self.tokenizer.id_to_token(token_id) is not None

    def special_named(self, texts: Sequence[str]) -> dict[int, str]:
        """Return those of `texts` that are names of special tokens, by the tokens' ids."""
        return {index: name for index, name in self.special.items() if name in texts}

    def token_text(self, token_id: int) -> str:
        """Return what a token reads as within a text; half a character reads as U+FFFD.

        A special token reads as its name, an id without a token as nothing.
        """
        alone = self.tokenizer.decode([token_id], skip_special_tokens=False)
        if token_id in self.added or token_id in self.bytes:
            return alone
        before = self.tokenizer.decode(self.before, skip_special_tokens=False)
        both = self.tokenizer.decode([*self.before, token_id], skip_special_tokens=False)
        return both[len(before) :] if both.startswith(before) else alone


@lru_cache(maxsize=8)
def vocabulary(tokenizer: Any) -> Vocabulary:
    """Return what decoding needs to know of a transformers fast tokenizer."""
    return Vocabulary(tokenizer)


def _byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    letter = tokenizer.token_to_id("<0x61>")
    # A vocabulary may have such tokens without a decoder that knows what they mean.
    if letter is None or tokenizer.decode([letter]) != "a":
        return {}
    found = {tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    return {index: byte for index, byte in found.items() if index is not None}


class _Decoder:
    """Decodes tokens one by one; what it returns joins to what the tokenizer makes of them all.

    With one exception: where characters fall back on their bytes, the tokenizers library makes
    U+FFFD of every byte in a row of them in which one is wrong. Characters that were complete
    before the wrong byte stay here.

    Decoders look at neighbours, so that a token is decoded behind those before it, and what those
    alone read as is taken off (as text-generation-inference and vLLM do). The tokenizers library's
    own stream decoder raises an error on bytes that are no text.
    """

    def __init__(self, known: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self._known = known
        self._context: list[int] = []
        self._read = ""
        """What the context reads as."""
        self._half = False
        """Whether U+FFFD at the end of it is withheld, as it may yet become a character."""
        self._run: list[int] = []
        """Byte tokens that do not make a character yet."""
        self._foreign = 0
        """How many of them belong to the prompt."""
        texts = (i for i in reversed(prompt_ids) if known.is_text(i))
        for token_id in reversed([*islice(texts, _PROMPT_TOKENS)]):
            self.push(token_id)
        self._foreign = len(self._run)
        # A half character of the prompt's own is no part of the completion.
        self._half = False

    def push(self, token_id: int) -> str:
        """Take one token and return the text that it settles."""
        if not self._known.is_text(token_id):
            return ""
        if token_id not in self._known.bytes:
            return self._broken(len(self._run)) + self._step([token_id])
        self._run.append(token_id)
        text = ""
        while self._run:
            run = bytes(self._known.bytes[i] for i in self._run)
            try:
                run.decode()
            except UnicodeDecodeError as error:
                # The run was the beginning of a character until now, so that it is wrong from its
                # start or goes on.
                if error.end == len(run) and error.reason == "unexpected end of data":
                    break
                text += self._broken(error.end)
            else:
                text += self._step(self._run)
                self._run, self._foreign = [], 0
                self._forget()
        return text

    def flush(self) -> str:
        """Return what was withheld at the end; half a character becomes U+FFFD."""
        text = self._broken(len(self._run)) + _UNKNOWN * self._half
        self._half = False
        return text

    def _broken(self, count: int) -> str:
        """Give up on bytes at the start of the run: one U+FFFD for each, as the library does."""
        if not count:
            return ""
        del self._run[:count]
        own = max(count - self._foreign, 0)
        self._foreign = max(self._foreign - count, 0)
        self._forget()
        return _UNKNOWN * own

    def _forget(self) -> None:
        """Begin a new context, for bytes would join with those in the present one."""
        self._context = [*self._known.before]
        self._read = self._decode(self._context)

    def _step(self, token_ids: list[int]) -> str:
        together = [*self._context, *token_ids]
        text = self._decode(together)
        settled = self._read[:-1] if self._half else self._read
        piece = text[_shared(settled, text) :]
        # Byte-level decoders show the beginning of a character as one U+FFFD; where bytes have
        # tokens of their own, it comes here as text only.
        self._half = piece.endswith(_UNKNOWN) and not self._known.bytes
        if len(together) > 2 * _CONTEXT_TOKENS:
            together = together[-_CONTEXT_TOKENS:]
            text = self._decode(together)
        self._context, self._read = together, text
        return piece[:-1] if self._half else piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._known.tokenizer.decode(token_ids, skip_special_tokens=True)


class TextStream:
    """Decodes one completion token by token.

    `push` returns the text that is safe to send. Characters whose bytes are not complete wait, and
    so does any text that may yet turn out to begin a stop string. A stop string that is complete
    within the first `min_new_tokens` tokens is text like any other.
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
        self._held = ""
        self._unstoppable = min_new_tokens
        """Tokens to come that cannot complete a stop string."""
        self.matched: str | None = None
        """The stop string that was met; nothing more may be pushed after it."""

    def push(self, token_id: int) -> str:
        """Take one token; return the text that it settles, up to a stop string if one is met."""
        assert self.matched is None, "the stream has ended"
        self._unstoppable -= 1
        return self._settle(self._decoder.push(token_id))

    def flush(self) -> str:
        """Return what was withheld at the stream's end; half a character becomes U+FFFD."""
        if self.matched is not None:
            return ""
        text = self._settle(self._decoder.flush())
        if self.matched is None:
            text, self._held = text + self._held, ""
        return text

    def _settle(self, piece: str) -> str:
        if not piece:
            return ""
        text = self._held + piece
        if self._unstoppable < 0:
            # What ends in the text held back was complete before it could count.
            ends = len(self._held) + 1
            places = [(text.find(stop, max(ends - len(stop), 0)), stop) for stop in self._stop]
            found = [(at, stop) for at, stop in places if at >= 0]
            if found:
                # The match that begins first wins; of two that do, the one listed first.
                at, self.matched = min(found, key=lambda match: match[0])
                self._held = ""
                return text[:at]
        longest = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]


def _shared(one: str, other: str) -> int:
    """Length of the longest beginning that two texts have in common."""
    if other.startswith(one):
        return len(one)
    return next(i for i, (a, b) in enumerate(zip(one, f"{other}\0", strict=False)) if a != b)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
