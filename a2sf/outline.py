"""What a model's settings alone say: its sizes, its dtype, and whether it can be served.

Owns reading them, and a model of whose weights nobody has read a byte. Beside `models` the only
seam with transformers. Knows nothing of weights, devices or attention.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from a2sf import families, files, gguf_file
from a2sf.errors import InvalidArgument, NotFound, first_line

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that caches and checks need."""

    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    """Positions the model was made for, in tokens."""


@dataclass(frozen=True)
class Outline:
    """A model whose weights nobody has read: what its settings alone say."""

    shape: ModelShape
    architecture: str
    device_type: str
    """What it would run on: "cuda" or "cpu"."""
    dtype: torch.dtype
    """What its weights would be loaded in."""
    module: Any
    """The transformers model on the meta device: sizes and dtypes without numbers."""
    directory: Path
    """Where its settings were found, and its weights if they are there."""
    gguf: gguf_file.GgufModel | None = None
    """The GGUF file that the model is, where it is one."""


def read_outline(
    id_or_path: str, *, revision: str | None = None, device_type: str = "cuda", dtype: str = "auto"
) -> Outline:
    """Read a model's settings as `load_model` does, and no weights, for a device that need not be.

    Args:
        id_or_path, revision, dtype: as for `load_model`.
        device_type: "cuda" or "cpu"; dtype "auto" depends on it.

    Raises:
        NotFound, Unsupported, InvalidArgument: as `load_model` does.
    """
    check_dtype(dtype)
    gguf = gguf_file.open_model(id_or_path)
    if gguf is None:
        directory = files.directory(id_or_path, revision, weights=False)
    else:
        directory = gguf.header.path.parent
    config = read_settings(id_or_path, directory, gguf)
    chosen = choose_dtype(dtype, device_type, config)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
    if gguf is not None:
        gguf.places(module)
    return Outline(
        shape=shape_of(config),
        architecture=config.architectures[0],
        device_type=device_type,
        dtype=chosen,
        module=module,
        directory=directory,
        gguf=gguf,
    )


def check_dtype(name: str) -> None:
    """Raise InvalidArgument for what is neither "auto" nor a dtype's name."""
    if name != "auto" and name not in _DTYPES:
        raise InvalidArgument("dtype", f"{name!r}; accepted: auto, {', '.join(_DTYPES)}")


def choose_dtype(name: str, device_type: str, config: Any) -> torch.dtype:
    """Return the dtype that weights are loaded in, on "cuda" or "cpu"."""
    stored = torch.float32 if device_type == "cpu" else config.dtype or torch.bfloat16
    return stored if name == "auto" else _DTYPES[name]


def read_settings(id_or_path: str, directory: Path, gguf: gguf_file.GgufModel | None = None) -> Any:
    """Read a model's settings, a transformers configuration, and refuse what cannot be served.

    Where the model is a GGUF file, its settings are those of `gguf`.
    Raises NotFound or Unsupported.
    """
    if gguf is not None:
        families.refuse_unsupported(id_or_path, gguf.config)
        return gguf.config
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise NotFound(f"model {id_or_path!r}: {first_line(error)}") from error
    families.refuse_unsupported(id_or_path, config)
    return config


def shape_of(config: Any) -> ModelShape:
    """Return a configuration's sizes."""
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
    )
