#!/usr/bin/env bash
# What people assume: a model loaded from a GGUF file (`gguf_file=`) computes what the file says, or
#   the load says what it leaves out.
# What happens: what it has no name for is left out without a word. A scaled rotation
#   (llama.rope.scaling.*) becomes an unscaled one; so does one that is scaled by the tensor
#   rope_freqs.weight, as in every Llama 3.1 and later; biases of attention are dropped; and a Qwen3
#   has heads of 128 whatever qwen3.attention.key_length says.
# Versions: transformers 5.23.0, gguf 0.19.0. 2026-11-30.
# Prints version and behaviour; exits 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
cd "$work"
venv/bin/python - 2>stderr <<'PYTHON' || { status=$?; cat stderr >&2; exit $status; }
import sys

import gguf
import numpy as np
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

HIDDEN, HEADS, DIM, VOCABULARY = 32, 2, 16, 40


def write(architecture: str, extra: dict[str, np.ndarray], scaled: bool) -> None:
    writer = gguf.GGUFWriter("m.gguf", architecture)
    writer.add_string("general.name", "tiny")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": HIDDEN,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "attention.key_length": DIM,
        "attention.value_length": DIM,
        "rope.dimension_count": DIM,
        "vocab_size": VOCABULARY,
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    tensors = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        **{f"blk.0.{n}.weight": (HIDDEN, HIDDEN) for n in ("attn_q", "attn_k", "attn_v")},
        **{f"blk.0.{n}.weight": (HIDDEN, HIDDEN) for n in ("attn_output", "ffn_gate", "ffn_up")},
        "blk.0.ffn_down.weight": (HIDDEN, HIDDEN),
    }
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


print("transformers", transformers.__version__)
factors = {"rope_freqs.weight": np.full(DIM // 2, 8.0, np.float32)}
bias = {"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}
write("llama", factors | bias, scaled=True)
model, told = AutoModelForCausalLM.from_pretrained(
    ".", gguf_file="m.gguf", output_loading_info=True
)
rotation = model.config.rope_parameters["rope_type"]
frequencies = model.model.rotary_emb.inv_freq.max().item()
biased = model.model.layers[0].self_attn.q_proj.bias is not None
unexpected = sorted(told["unexpected_keys"])
print(f"rotation {rotation!r}, highest frequency {frequencies}, biased {biased}")
print(f"told of what was left out: {unexpected}")
write("qwen3", {}, scaled=False)
wide = AutoConfig.from_pretrained(".", gguf_file="m.gguf").head_dim
print(f"qwen3.attention.key_length is {DIM}, and head_dim {wide}")
sys.exit((rotation, frequencies, biased, unexpected, wide) != ("default", 1.0, False, [], 128))
PYTHON
