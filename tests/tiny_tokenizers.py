"""Tiny tokenizers of the common kinds, as transformers' fast tokenizers."""

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

TURNS = ("<|turn|>", "<|end|>")
"""Special tokens of a template."""

PIECES = ("hi", "there", "a", "b", "1", "2", ".", "system", "user", "assistant")
SYMBOLS = [chr(code) for code in range(33, 127)]


def _finish(tokenizer: Tokenizer, begin: bool = True) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", *TURNS)])
    if begin:
        first = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", first)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _merges(vocabulary: dict[str, int], words: list[str]) -> list[tuple[str, str]]:
    """Add all prefixes of each word to a vocabulary."""
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            for part in (*pair, word[:end]):
                vocabulary.setdefault(part, len(vocabulary))
            if pair not in merges:
                merges.append(pair)
    return merges


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2, Llama 3 and Qwen: byte-level merges in words with their leading space."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = [f"{space}{piece}" for piece in PIECES for space in ("", "Ġ")]
    # Merges across a line end, and a character in incomplete pieces.
    words += ["ĊĊ", ">Ċ", "ä½", "ðŁĺ"]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(vocabulary, words)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, begin=False)


def byte_fallback(scheme: str | None = None) -> PreTrainedTokenizerFast:
    """Like Llama 2, Mistral and Phi-3: spaces are `▁`, unknown characters become byte tokens.

    `scheme` is that of a Metaspace pre-tokenizer; without it, a normalizer writes the spaces.
    """
    vocabulary = {"<unk>": 0}
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *SYMBOLS):
        vocabulary.setdefault(token, len(vocabulary))
    words = [f"{space}{piece}" for piece in PIECES for space in ("", "▁")]
    merges = _merges(vocabulary, words)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    if scheme is None:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _finish(tokenizer)


def metaspace_unigram() -> PreTrainedTokenizerFast:
    """Like ALBERT and XLM-R: the likeliest pieces, with spaces as `▁`, and no bytes."""
    pieces: list[tuple[str, float]] = [("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(symbol, -4.0) for symbol in SYMBOLS]
    known = {piece for piece, _ in pieces}
    words = (f"{space}{piece}" for piece in PIECES for space in ("", "▁"))
    pieces += [(word, -2.0) for word in words if word not in known]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _finish(tokenizer)


def word_pieces() -> PreTrainedTokenizerFast:
    """Like BERT: whole words, and `##` before the other pieces of a word."""
    vocabulary = {"[UNK]": 0}
    for token in (*PIECES, *SYMBOLS):
        for written in (token, f"##{token}"):
            vocabulary.setdefault(written, len(vocabulary))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _finish(tokenizer)


def words() -> PreTrainedTokenizerFast:
    """Whole words, without a decoder; U+FFFD is one of the words."""
    known = dict.fromkeys(("[UNK]", *PIECES, *SYMBOLS[:15], "\ufffd"))
    vocabulary = {word: index for index, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finish(tokenizer)


KINDS: dict[str, Any] = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "byte_fallback_first": byte_fallback("first"),
    "byte_fallback_always": byte_fallback("always"),
    "metaspace_unigram": metaspace_unigram(),
    "word_pieces": word_pieces(),
    "words": words(),
}
"""One tokenizer of each kind."""
