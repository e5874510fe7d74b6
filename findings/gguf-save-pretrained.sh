#!/usr/bin/env bash
# What people assume: a model that was loaded from a GGUF file is a model like any other once it is
#   loaded, all of its weights in plain float32, so that save_pretrained turns it into safetensors.
# What happens: save_pretrained raises, because the configuration carries a quantization_config
#   although no weight is quantised any more. Delete that from a copy of the configuration, build a
#   fresh model from it, and load the state dict into it.
# Versions: transformers 5.23.0, gguf 0.19.0, accelerate 1.15.0. 2026-11-30.
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
import torch
import transformers
from transformers import AutoModelForCausalLM

HIDDEN = 32
writer = gguf.GGUFWriter("m.gguf", "llama")
writer.add_string("general.name", "tiny")
for key, value in {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": HIDDEN,
    "feed_forward_length": HIDDEN,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 16,
    "vocab_size": 40,
}.items():
    writer.add_uint32(f"llama.{key}", value)
writer.add_layer_norm_rms_eps(1e-5)
matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
q8 = gguf.GGMLQuantizationType.Q8_0
for name, rows in [("token_embd", 40), *((f"blk.0.{name}", HIDDEN) for name in matrices)]:
    packed = gguf.quantize(np.ones((rows, HIDDEN), np.float32), q8)
    writer.add_tensor(f"{name}.weight", packed, raw_dtype=q8)
for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
    writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

model = AutoModelForCausalLM.from_pretrained(".", gguf_file="m.gguf")
print("transformers", transformers.__version__)
print("dtypes of the weights:", {parameter.dtype for parameter in model.parameters()})
try:
    model.save_pretrained("saved")
except ValueError as error:
    print("save_pretrained:", str(error).splitlines()[0])
    sys.exit({p.dtype for p in model.parameters()} != {torch.float32})
sys.exit("save_pretrained now works")
PYTHON
