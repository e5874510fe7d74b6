"""The reference model's tokenizer: byte-level BPE in which every number up to 999 is one token.

Owns the pre-tokenizer's pattern and the order of merges. Any UTF-8 text round-trips exactly and
nothing is unknown, since all 256 bytes are tokens. Run as a module it writes the tokenizer's files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from training.corpus import default_data_dir, documents
from tuner.data.generated import ADJECTIVES, ATTRIBUTES, NAMES, NOUNS, PLACES

BOS = "<|bos|>"
EOS = "<|eos|>"
VOCAB_SIZE = 4096
PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+(?!\S)|\s+"
SPACE = "Ġ"


def build(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train on the texts; the result has exactly ``vocab_size`` tokens if they are rich enough."""
    numbers = _number_merges()
    number_tokens = {a + b for a, b in numbers}
    learned = _learn(texts, vocab_size + 1100)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [BOS, EOS, *alphabet]
    merges = list(numbers)
    tokens.extend(dict.fromkeys(a + b for a, b in numbers))
    for a, b in learned:
        if len(tokens) == vocab_size:
            break
        if a + b in number_tokens or any(char in "0123456789" for char in a + b):
            continue
        merges.append((a, b))
        if a + b not in tokens:
            tokens.append(a + b)
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    _set_surroundings(tokenizer)
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, vocab[BOS])],
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _set_surroundings(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()


def _number_merges() -> list[tuple[str, str]]:
    """Merges to 10..999, whichever pair of digits merges first, then each with its space."""
    merges = [(str(n // 10), str(n % 10)) for n in range(10, 100)]
    for n in range(100, 1000):
        digits = str(n)
        merges.append((digits[:2], digits[2]))
        if digits[1] != "0":
            merges.append((digits[0], digits[1:]))
    return merges + [(SPACE, str(n)) for n in range(1000)]


def _learn(texts: Iterator[str], vocab_size: int) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(BPE())
    _set_surroundings(tokenizer)
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(a, b) for a, b in merges]


def _texts(data_dir: Path) -> Iterator[str]:
    for pieces in documents(data_dir, "train").values():
        yield from pieces
    # The generators' words, often enough that each becomes one token.
    words = [*NOUNS, *ADJECTIVES, *NAMES, *PLACES, *ATTRIBUTES]
    rng = Random(0)
    for _ in range(3000):
        rng.shuffle(words)
        yield " " + " ".join(words)


def main() -> None:
    """Write the tokenizer of the reference model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("a2sf/reference"))
    args = parser.parse_args()
    save(build(_texts(args.data_dir or default_data_dir())), args.out)


if __name__ == "__main__":
    main()
