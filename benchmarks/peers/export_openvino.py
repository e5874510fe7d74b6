"""Writes a model as OpenVINO IR in float32: `python -m peers.export_openvino MODEL OUT`.

Runs in the OpenVINO environment. One export serves every precision, because the precisions of
inference and of the KV cache are set when the model is compiled.
"""

import sys

from optimum.intel import OVModelForCausalLM


def main(model: str, out: str) -> None:
    """Convert, without compressing the weights."""
    import torch

    converted = OVModelForCausalLM.from_pretrained(
        model, export=True, compile=False, load_in_8bit=False, dtype=torch.float32
    )
    converted.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
