"""Control tokens that a message's content spells out are encoded as text.

Owns distinguishing the template's own control tokens from those in contents, and encoding both in
one call, so that merges across their borders do not change. Knows nothing of templates.
"""

import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from a2sf.errors import InvalidArgument
from a2sf.text.detokenizer import vocabulary


class Controls:
    """The control tokens of one tokenizer.

    They are its special tokens, and the tokens `further`: those that the template uses although
    they are not marked as special.
    """

    def __init__(self, tokenizer: Any, further: Iterable[int]) -> None:
        known = vocabulary(tokenizer)
        ids = known.special.keys() | set(further)
        self._tokenizer = tokenizer
        self._ids = {known.added[index].content: index for index in ids}
        self._pattern = _any_of(self._ids)
        model = known.tokenizer.model
        unknown = (tokenizer.unk_token_id, known.tokenizer.token_to_id(_unknown(model)))
        self._counted = set(self._ids.values()).difference(unknown)
        """Ids of the control tokens, without the unknown token, which any content may produce."""

    def placeholders(self, contents: Sequence[str]) -> dict[str, str]:
        """Return a placeholder for each control token that `contents` spell out.

        No content contains a placeholder.
        """
        found = {name for content in contents for name in self._pattern.findall(content)}
        if not found:
            return {}
        word = f"mark{secrets.token_hex(8)}"
        return {name: f"{word}n{self._ids[name]}n" for name in found}

    def replace(self, content: str, placeholders: Mapping[str, str]) -> str:
        """Replace control tokens by their placeholders."""
        return self._pattern.sub(lambda match: placeholders[match[0]], content)

    def restore(self, text: str, placeholders: Mapping[str, str]) -> str:
        """Replace placeholders by their control tokens."""
        names = {word: name for name, word in placeholders.items()}
        return _any_of(names).sub(lambda match: names[match[0]], text)

    def describe(self, placeholders: Mapping[str, str]) -> str:
        """List up to three of the control tokens in `placeholders`, for a message."""
        return ", ".join(sorted(placeholders)[:3]) + (", ..." if len(placeholders) > 3 else "")

    def encode_all(self, text: str) -> tuple[int, ...]:
        """Encode `text`; every control token in it becomes a control token."""
        encoded = self._tokenizer(text, verbose=False, add_special_tokens=False)
        return tuple(encoded.input_ids)

    def encode(self, text: str, placeholders: Mapping[str, str]) -> tuple[int, ...]:
        """Encode `text`. Placeholders become the text of their control tokens.

        Raises InvalidArgument if the tokenizer encodes one of them as a control token anyway.
        """
        own = Counter(self._ids[name] for name in self._pattern.findall(text))
        if not placeholders:
            ids = self.encode_all(text)
            # A tokenizer that normalises the text first may find more than the text spells out.
            if not self._exceeding(ids, own):
                return ids
        ids = self._aliased.encode(text, self._pattern, placeholders)
        if exceeding := self._exceeding(ids, own):
            names = {index: name for name, index in self._ids.items()}
            raise InvalidArgument(
                "chat",
                f"a message spells {names[min(exceeding)]}, which the model's tokenizer cannot "
                "read as text; leave it out, or set special_tokens_in_content",
            )
        return ids

    def _exceeding(self, ids: Iterable[int], own: Counter[int]) -> set[int]:
        counts = Counter(index for index in ids if index in self._counted)
        return set(counts - own)

    @cached_property
    def _aliased(self) -> "_AliasedTokenizer":
        # Made only when needed: it takes a second for a large vocabulary.
        return _AliasedTokenizer.of(vocabulary(self._tokenizer).tokenizer, self._ids)


@dataclass(frozen=True)
class _AliasedTokenizer:
    """A copy of a tokenizer that knows control tokens only by secret aliases.

    A copy, because several threads use the tokenizer itself at the same time.
    """

    tokenizer: Tokenizer
    aliases: Mapping[str, str]
    """The alias of each control token's name; random, so no user can guess it."""
    ids: Mapping[int, int]
    """Id of the alias -> id of the control token."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Mapping[str, int]) -> "_AliasedTokenizer":
        copy = Tokenizer.from_str(tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        word = f"alias{secrets.token_hex(16)}"
        aliases = {name: f"{word}n{index}n" for name, index in ids.items()}
        # Then encoding ignores special tokens. Mark all control tokens as special.
        copy.encode_special_tokens = True
        copy.add_special_tokens([_like(added[i], name, special=True) for name, i in ids.items()])
        copy.add_tokens([_like(added[i], aliases[name], special=False) for name, i in ids.items()])
        meant = {alias: ids[name] for name, alias in aliases.items()}
        decoder = copy.get_added_tokens_decoder().items()
        return cls(copy, aliases, {i: meant[t.content] for i, t in decoder if t.content in meant})

    def encode(
        self, text: str, names: re.Pattern[str], placeholders: Mapping[str, str]
    ) -> tuple[int, ...]:
        """Encode `text`: its control tokens as control tokens, placeholders as plain text."""
        text = names.sub(lambda match: self.aliases[match[0]], text)
        spelled = {word: name for name, word in placeholders.items()}
        if spelled:
            text = _any_of(spelled).sub(lambda match: spelled[match[0]], text)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return tuple(self.ids.get(index, index) for index in ids)


def _like(token: AddedToken, name: str, *, special: bool) -> AddedToken:
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=special,
    )


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Match the longest of `names` at a position; without names, match nothing."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _unknown(model: Any) -> str:
    name: str | None = getattr(model, "unk_token", None)
    return name or ""
