"""A GGUF file's vocabulary splits text as in the model's training, or is refused."""

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from a2sf.errors import NotFound, Unsupported
from a2sf.model.gguf_file.header import Header
from a2sf.model.gguf_file.vocabulary import RULES, Vocabulary
from a2sf.model.loader import LoadedModel, load_model
from a2sf.model.spec import read_model_spec
from a2sf.requests import ChatMessage
from a2sf.text import chat_template
from tests.gguf_files import BYTE, CONTROL, NORMAL, TOKENS, save_checkpoint, save_gguf
from tests.tiny import BOS, EOS

TEXT = "I'LL see\n\n12 1234  x"

# Derived by hand from the regular expressions in llama.cpp and in the models' tokenizer.json.
PIECES = {
    "gpt-2": "I|'|LL| see|\n|\n|12| 1234| | x",
    "smollm": "I|'|LL| see|\n\n|1|2| |1|2|3|4| | x",
    "llama-bpe": "I|'LL| see|\n\n|12| |123|4| | x",
    "llama3": "I|'LL| see|\n\n|12| |123|4| | x",
    "llama-v3": "I|'LL| see|\n\n|12| |123|4| | x",
    "qwen2": "I|'LL| see|\n\n|1|2| |1|2|3|4| | x",
    "tekken": "I|'LL| see|\n\n|1|2| |1|2|3|4| | x",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def vocabulary(checkpoint: Path, path: Path, **settings: Any) -> Vocabulary:
    said = {f"tokenizer__ggml__{key}": value for key, value in settings.items()}
    return Vocabulary("m", Header("m", save_gguf(checkpoint, path / "m.gguf", **said)))


def load(path: Path) -> LoadedModel:
    return load_model(str(path), device="cpu", dtype="float32")


@pytest.mark.parametrize("rule", RULES)
def test_text_is_split_by_the_rule_in_the_file(rule: str, checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = vocabulary(checkpoint, tmp_path, pre=rule).tokenizer()
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in cut] == PIECES[rule].split("|")


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].split])
def test_the_rules_equal_those_of_another_library(rule: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert RULES[rule].split == GGUF_PRE_TOKENIZER_SPLITS[rule]


def test_each_rule_splits_digits_after_line_ends_differently(
    checkpoint: Path, tmp_path: Path
) -> None:
    def tokens(rule: str) -> list[str]:
        ids = vocabulary(checkpoint, tmp_path, pre=rule).tokenizer()("\n\n12 12").input_ids
        return [TOKENS[index] for index in ids]

    assert tokens("gpt-2") == ["Ċ", "Ċ", "12", "Ġ", "12"]
    assert tokens("smollm") == ["ĊĊ", "1", "2", "Ġ", "1", "2"]
    assert tokens("llama-bpe") == ["ĊĊ", "12", "Ġ", "12"]


def test_rules_with_whole_words_find_tokens_without_merges(
    checkpoint: Path, tmp_path: Path
) -> None:
    tokens = ["whole" if token == "ĠĠ" else token for token in TOKENS]
    types = [CONTROL if token in ("<bos>", "<eos>") else NORMAL for token in tokens]
    changed = {"tokens": tokens, "token_type": types, "merges": ["1 2"]}
    whole = vocabulary(checkpoint, tmp_path, pre="llama-bpe", **changed).tokenizer()
    assert whole("whole").input_ids == [TOKENS.index("ĠĠ")]
    spelled = vocabulary(checkpoint, tmp_path, pre="qwen2", **changed).tokenizer()
    assert len(spelled("whole").input_ids) == 5


def test_characters_are_composed_if_the_rule_says_so(checkpoint: Path, tmp_path: Path) -> None:
    for rule, same in [("qwen2", True), ("gpt-2", False)]:
        tokenizer = vocabulary(checkpoint, tmp_path, pre=rule).tokenizer()
        assert (tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids) is same


def test_control_tokens_and_user_defined_tokens_are_not_split(
    checkpoint: Path, tmp_path: Path
) -> None:
    tokenizer = vocabulary(checkpoint, tmp_path).tokenizer()
    think = TOKENS.index("<think>")
    ids = tokenizer("a<think>b<eos>").input_ids
    assert ids == [TOKENS.index("a"), think, TOKENS.index("b"), EOS]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
    assert tokenizer.decode(tokenizer("naïve 日本 \n\n 12").input_ids) == "naïve 日本 \n\n 12"


@pytest.mark.parametrize(
    ("rule", "said", "adds"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("gpt-2", False, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_the_bos_token_is_added_if_the_file_says_so(
    rule: str, said: bool | None, adds: bool, checkpoint: Path, tmp_path: Path
) -> None:
    path = save_gguf(
        checkpoint,
        tmp_path / "m.gguf",
        tokenizer__ggml__pre=rule,
        tokenizer__ggml__add_bos_token=said,
    )
    model = load(path)
    assert model.encode("the") == ((BOS,) if adds else ()) + (TOKENS.index("the"),)
    assert model.encode("the", special=False) == (TOKENS.index("the"),)
    assert model.tokenizer.bos_token == "<bos>"


def test_the_chat_template_comes_from_the_file(checkpoint: Path, tmp_path: Path) -> None:
    talk = [ChatMessage(role="user", content="Hi")]
    model = load(save_gguf(checkpoint, tmp_path / "m.gguf"))
    assert chat_template.read(model.tokenizer, talk, max_bytes=100).text == "<bos>user: Hi<eos>"
    without = save_gguf(checkpoint, tmp_path / "without.gguf", tokenizer__chat_template=None)
    with pytest.raises(Unsupported, match="no chat template"):
        chat_template.read(load(without).tokenizer, talk, max_bytes=100)


SPM_TOKENS = [
    *("<unk>", "<s>", "</s>"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("▁", "a", "b", "c", "ab", "bc", "▁a", "▁abc", "abc", "▁▁"),
]
SPM = {
    "model": "llama",
    "pre": "default",
    "tokens": SPM_TOKENS,
    "token_type": [2, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 10],
    # In "abc", the token "bc" is better than "ab", and "▁a" is the worst.
    "scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -3.0, -1.0, -5.0, -8.0, -4.0, -2.0],
    "merges": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    "add_bos_token": None,
}


@pytest.mark.parametrize(
    ("text", "prefix", "pieces"),
    [
        ("abc", None, ["<s>", "▁abc"]),
        ("abc", False, ["<s>", "abc"]),
        (" abc", None, ["<s>", "▁▁", "abc"]),
        ("ab c", None, ["<s>", "▁", "ab", "▁", "c"]),
        ("é", None, ["<s>", "▁", "<0xC3>", "<0xA9>"]),
        ("c</s>c", None, ["<s>", "▁", "c", "</s>", "▁", "c"]),
    ],
)
def test_a_sentencepiece_vocabulary_merges_the_best_token_first(
    text: str, prefix: bool | None, pieces: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    read = vocabulary(checkpoint, tmp_path, **SPM, add_space_prefix=prefix)
    tokenizer = read.tokenizer()
    assert [SPM_TOKENS[index] for index in tokenizer(text).input_ids] == pieces
    if "</s>" not in text:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pre": "falcon"}, r"rule 'falcon' \(tokenizer\.ggml\.pre\); supported: gpt-2, smollm"),
        ({"pre": None}, "rule None"),
        ({"pre": "default"}, "rule 'default'"),
        ({"model": "t5"}, "vocabulary of kind 't5'; supported"),
        ({"add_eos_token": True}, "ends every prompt with its end-of-sequence token"),
        ({"tokens": None, "token_type": None}, "holds no vocabulary"),
        ({"merges": None}, "no merges"),
        ({"tokens": [*TOKENS, "a"], "token_type": None}, "a token twice"),
        (
            {"tokens": [*TOKENS, *map(str, range(99, 199))], "token_type": None},
            "has fewer embeddings than tokens",
        ),
        ({"bos_token_id": 999}, "bos_token_id is 999"),
        ({"bos_token_id": None, "add_bos_token": True}, "names none"),
        ({**SPM, "scores": None}, "has no scores for its tokens"),
    ],
)
def test_an_unsupported_vocabulary_is_refused_by_name(
    settings: dict[str, Any], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    said = {f"tokenizer__ggml__{key}": value for key, value in settings.items()}
    path = save_gguf(checkpoint, tmp_path / "m.gguf", **said)
    with pytest.raises((NotFound, Unsupported), match=says) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    if "supported" in says:
        with pytest.raises(Unsupported, match=says):
            read_model_spec(str(path))


def test_the_libraries_read_the_same_strings(checkpoint: Path, tmp_path: Path) -> None:
    path = save_gguf(checkpoint, tmp_path / "m.gguf")
    header = Header("m", path)
    reader = GGUFReader(path)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        assert header.strings(key) == reader.fields[key].contents()
