"""Builds a tokenizer from a GGUF file's vocabulary.

Owns the supported kinds of vocabulary, the pre-tokenizer rules for byte-level merges, and the
tokens that end an answer. A file holds only the name of its rule (`tokenizer.ggml.pre`). For an
unknown name, transformers 5.23 silently splits like GPT-2; here it is refused. Knows nothing of
weights.

The rules are those of llama.cpp (src/llama-vocab.cpp), written as in the models' own
tokenizer.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from a2sf.errors import NotFound, Unsupported
from a2sf.model.gguf_file.header import Header

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"

LLAMA3_SPLIT = _LETTERS + r"|\p{N}{1,3}" + _REST
QWEN2_SPLIT = _LETTERS + r"|\p{N}" + _REST
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rule:
    """How text is split before the merges of a byte-level vocabulary."""

    split: str | None = None
    """Regular expression of the pieces; None: that of GPT-2."""
    digits: bool = False
    """Whether each digit is a separate piece; applied before `split`."""
    whole_words: bool = False
    """Whether a piece that is in the vocabulary becomes one token, without merges."""
    adds_bos: bool = False
    """Whether to add the beginning-of-sequence token if the file does not say."""
    composes: bool = False
    """Whether to compose characters first (NFC)."""


_LLAMA3 = Rule(LLAMA3_SPLIT, whole_words=True, adds_bos=True)

RULES: Mapping[str, Rule] = {
    "gpt-2": Rule(),
    "smollm": Rule(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Rule(QWEN2_SPLIT, composes=True),
    "tekken": Rule(TEKKEN_SPLIT, whole_words=True, adds_bos=True),
}
"""Rules by their name in `tokenizer.ggml.pre`."""

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_ENDS = frozenset(
    {
        "</s>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
    }
)
"""Names of control tokens that end an answer. Needed because a file names one end token, and chat
models have two. llama.cpp stops at them too."""


def rule_of(name: str, header: Header) -> Rule | None:
    """Return the pre-tokenizer rule of a file's vocabulary; None for sentencepiece.

    Raises Unsupported for an unsupported kind of vocabulary or rule, and if the file adds an
    end-of-sequence token to every prompt.
    """
    kind, pre = (header.settings.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if header.settings.get("tokenizer.ggml.add_eos_token"):
        raise Unsupported(
            f"model {name!r}: the file ends every prompt with its end-of-sequence token "
            "(tokenizer.ggml.add_eos_token), after which there is nothing to complete"
        )
    if kind == "llama":
        return None
    if kind != "gpt2":
        raise Unsupported(
            f"model {name!r} has a vocabulary of kind {kind!r}; supported in a GGUF file: gpt2 "
            "(byte-level) and llama (sentencepiece)"
        )
    if not isinstance(pre, str) or pre not in RULES:
        raise Unsupported(
            f"model {name!r} splits text by rule {pre!r} (tokenizer.ggml.pre); supported: "
            f"{', '.join(RULES)}"
        )
    return RULES[pre]


class Vocabulary:
    """The vocabulary of a file, with its settings."""

    def __init__(self, name: str, header: Header) -> None:
        """Read the tokens; `name` is the user's name for the model.

        Raises:
            NotFound: there are no tokens, duplicates, or more tokens than embeddings.
            Unsupported: as `rule_of`.
        """
        self._name, self._header = name, header
        tokens = header.strings("tokenizer.ggml.tokens")
        if not tokens:
            raise NotFound(f"model {name!r}: {header.path.name} holds no vocabulary")
        self.tokens: list[str] = tokens
        self.ids = {token: index for index, token in enumerate(tokens)}
        if len(self.ids) != len(tokens):
            raise NotFound(f"model {name!r}: {header.path.name} holds a token twice")
        if len(tokens) > header.tensors["token_embd.weight"].shape[0]:
            raise NotFound(f"model {name!r}: {header.path.name} has fewer embeddings than tokens")
        self.types: Sequence[int] = self._said("token_type") or [1] * len(tokens)
        self._rule = rule_of(name, header)
        adds_bos = self._rule is None or self._rule.adds_bos
        self.adds_bos = bool(self._said("add_bos_token", adds_bos))
        if self.adds_bos and self.special("bos") is None:
            raise NotFound(
                f"model {name!r}: the file asks for a beginning-of-sequence token but names none"
            )

    def special(self, role: str) -> str | None:
        """The token of a role, such as "bos" or "eos"; None if the file names none."""
        index: int | None = self._said(f"{role}_token_id")
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise NotFound(
                f"model {self._name!r}: {role}_token_id is {index}, and there are "
                f"{len(self.tokens)} tokens"
            )
        return self.tokens[index]

    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: those that the file names, and those in `_ENDS`."""
        named = {self.special(role) for role in ("eos", "eot", "eom")} - {None}
        by_name = {
            token
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind == _CONTROL and token in _ENDS
        }
        return frozenset(self.ids[token] for token in named | by_name if token is not None)

    def tokenizer(self) -> Any:
        """Build the transformers tokenizer, with the file's chat template if it has one."""
        inner = self._sentencepiece() if self._rule is None else self._byte_level(self._rule)
        for kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            added = [
                AddedToken(token, normalized=False, special=special)
                for token, stored in zip(self.tokens, self.types, strict=True)
                if stored == kind
            ]
            (inner.add_special_tokens if special else inner.add_tokens)(added)
        bos = self.special("bos")
        if self.adds_bos and bos is not None:
            inner.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, self.ids[bos])]
            )
        unknown = self.special("unknown")
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            bos_token=bos,
            eos_token=self.special("eos"),
            unk_token=unknown,
            pad_token=self.special("padding"),
            chat_template=self._header.settings.get("tokenizer.chat_template"),
        )

    def _said(self, key: str, default: Any = None) -> Any:
        return self._header.settings.get(f"tokenizer.ggml.{key}", default)

    def _byte_level(self, rule: Rule) -> Tokenizer:
        merges = self._header.strings("tokenizer.ggml.merges")
        if merges is None:
            raise NotFound(f"model {self._name!r}: the file has a vocabulary but no merges")
        # The first token may start with a space, so the separator is the first space after that.
        pairs = [(merge[: (cut := merge.index(" ", 1))], merge[cut + 1 :]) for merge in merges]
        inner = Tokenizer(models.BPE(vocab=self.ids, merges=pairs, ignore_merges=rule.whole_words))
        steps: list[Any] = []
        if rule.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if rule.split is not None:
            steps.append(pre_tokenizers.Split(Regex(rule.split), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None))
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if rule.composes:
            inner.normalizer = normalizers.NFC()
        inner.decoder = decoders.ByteLevel()
        return inner

    def _sentencepiece(self) -> Tokenizer:
        scores = self._said("scores")
        if not isinstance(scores, list) or len(scores) != len(self.tokens):
            raise NotFound(f"model {self._name!r}: the file has no scores for its tokens")
        prefix = bool(self._said("add_space_prefix", True))
        inner = Tokenizer(
            models.BPE(
                vocab=self.ids,
                merges=_merges(self.ids, scores),
                unk_token=self.special("unknown"),
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        steps = [normalizers.Replace(" ", "▁")]
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), *steps] if prefix else steps
        )
        back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        inner.decoder = decoders.Sequence(
            [*back, decoders.Strip(content=" ", left=1)] if prefix else back
        )
        return inner


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that sentencepiece's scores imply: all splits of the best token come first."""
    found = []
    for token, index in ids.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        made = [(left, right) for left, right in halves if left in ids and right in ids]
        made.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(-scores[index], pair) for pair in made]
    found.sort(key=lambda one: one[0])
    return [pair for _, pair in found]
