#!/usr/bin/env bash
# What people assume: a tokenizer loaded from a GGUF file (`gguf_file=`) cuts text by the rule that
#   the file names in tokenizer.ggml.pre, or refuses a rule that it does not know.
# What happens: it knows some rules by name, and cuts as GPT-2 does under any other, without a word.
#   "smollm" (llama.cpp: every digit is a piece of its own) is one of those: two line ends before a
#   digit become other tokens than the model was trained with. Texts come back whole, which hides it.
#   "llama-bpe" is cut rightly, but a piece that is a token by itself is not taken whole, as the
#   models' own tokenizers do (ignore_merges).
# Versions: transformers 5.23.0, gguf 0.19.0, tokenizers 0.23.3. 2026-11-30.
# Prints version and behaviour; exits 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 gguf==0.19.0 tokenizers==0.23.3 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import sys

import gguf
import numpy as np
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>", "ĊĊ", "whole"]


def tokens(rule: str, text: str) -> list[str]:
    writer = gguf.GGUFWriter("m.gguf", "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 2,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("general.name", "tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 256 + [3, 1, 1])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_eos_token_id(256)
    writer.add_add_bos_token(False)
    writer.add_tensor("token_embd.weight", np.zeros((len(TOKENS), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="m.gguf")
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


print("transformers", transformers.__version__)
found = {
    "smollm": tokens("smollm", "\n\n1"),
    "made-up-rule": tokens("made-up-rule", "\n\n1"),
    "llama-bpe": tokens("llama-bpe", "whole"),
}
for rule, cut in found.items():
    print(f"{rule}: {cut}")
right = {"smollm": ["ĊĊ", "1"], "llama-bpe": ["whole"]}
print(f"by the models' own tokenizers: {right}")
sys.exit(
    found
    != {
        "smollm": ["Ċ", "Ċ", "1"],
        "made-up-rule": ["Ċ", "Ċ", "1"],
        "llama-bpe": list("whole"),
    }
)
PYTHON
