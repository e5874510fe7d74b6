"""From tokens to text, as they come: whole characters only, and stop strings never leak.

Owns one stream's undecoded tokens and withheld characters. Decoding is the tokenizers library's
own stream decoder. Knows nothing of models or caches.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT_TOKENS = 6
"""Prompt tokens the decoder sees first, so that a leading space is decoded as in the full text."""


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
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        context = list(prompt_ids[-_CONTEXT_TOKENS:])
        # A prompt that ends within a character cannot be a prefix of what it becomes.
        whole = not self._tokenizer.decode(context).endswith("\ufffd")
        self._decoder = DecodeStream(ids=context if whole else [], skip_special_tokens=True)
        self._undecoded: list[int] = []
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
        self._undecoded.append(token_id)
        piece = self._decoder.step(self._tokenizer, token_id)
        if piece is None:
            return ""
        self._undecoded.clear()
        return self._settle(piece)

    def flush(self) -> str:
        """Return what was withheld at the stream's end; half a character becomes U+FFFD."""
        if self.matched is not None:
            return ""
        rest = self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        self._undecoded.clear()
        text = self._settle(rest)
        if self.matched is None:
            text, self._held = text + self._held, ""
        return text

    def _settle(self, piece: str) -> str:
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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
