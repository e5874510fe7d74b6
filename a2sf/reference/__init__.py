"""The small model in this package: a folder of files, found by :func:`path`.

Loads like any local model (config, bfloat16 safetensors, tokenizer). Its card, ``README.md``, has
measurements of what it can do. Imports no large library.
"""

from pathlib import Path


def path() -> Path:
    """The folder, for ``AutoModelForCausalLM.from_pretrained``."""
    return Path(__file__).parent
