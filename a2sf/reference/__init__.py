"""The small model that ships with the package: a folder of files, found by :func:`path`.

Loads like any local model (config, bfloat16 safetensors, tokenizer). What it can and cannot do is
measured in its card, ``README.md``. Imports nothing heavy.
"""

from pathlib import Path


def path() -> Path:
    """The folder to give to ``AutoModelForCausalLM.from_pretrained``."""
    return Path(__file__).parent
