"""From a checkpoint to the files of ``a2sf/reference``: bfloat16 safetensors and configurations.

Works on the checkpoint of a running training, since checkpoints are renamed into place. Leaves the
tokenizer and the card alone.

Usage: ``python -m training.export --checkpoint DIR [--out a2sf/reference]``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.config import Shape
from training.model import BOS_ID, EOS_ID, build_model
from training.train import CHECKPOINT


def export(checkpoint: Path, out: Path) -> Path:
    """Write config, generation config and weights; returns the path of the weights."""
    state = torch.load(checkpoint / CHECKPOINT, map_location="cpu", weights_only=True)
    model = build_model(Shape(**state["shape"]))
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16)
    assert model.generation_config is not None
    model.generation_config.bos_token_id = BOS_ID
    model.generation_config.eos_token_id = EOS_ID
    model.generation_config.pad_token_id = EOS_ID
    model.save_pretrained(out)
    return out / "model.safetensors"


def main() -> None:
    """Export the release files of a checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder given to --out")
    parser.add_argument("--out", type=Path, default=Path("a2sf/reference"))
    args = parser.parse_args()
    weights = export(args.checkpoint, args.out)
    print(f"{weights}: {weights.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
