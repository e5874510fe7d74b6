"""A model's settings: its sizes, its dtype, and whether it can be served.

Owns reading the settings, and a model without weights. Together with
`loader` and `layer_attention` this is the only interface to transformers. Knows nothing of weights,
devices or attention.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from a2sf.errors import A2SFError, NotFound, Unsupported, one_line
from a2sf.model import checkpoint, dtypes, families, gguf_file, locate
from a2sf.model.checkpoint import Stored
from a2sf.model.dtypes import DTYPES

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
"""Files that hold a vocabulary."""


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes, for caches and checks."""

    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    """The model's context, in tokens."""

    def divided(self, processes: int) -> Self:
        """The sizes in one of several processes that share the heads evenly."""
        return replace(
            self,
            num_attention_heads=self.num_attention_heads // processes,
            num_kv_heads=self.num_kv_heads // processes,
        )


@dataclass(frozen=True)
class ModelSpec:
    """A model without weights, as its settings describe it."""

    shape: ModelShape
    architecture: str
    device_type: str
    """The device it is planned for: "cuda" or "cpu"."""
    dtype: torch.dtype
    """The dtype in which its weights would be loaded."""
    dtype_reason: str
    """The reason for the dtype, for people to read."""
    module: Any
    """The transformers model on the meta device: sizes and dtypes without data."""
    directory: Path
    """The directory of its settings, and of its weights if it has them."""
    stored: Mapping[str, Stored] | None = None
    """The headers of its safetensors files; None if there are no such files."""
    gguf: gguf_file.GgufModel | None = None
    """The model's GGUF file, if it is one."""


def read_model_spec(
    id_or_path: str, *, revision: str | None = None, device_type: str = "cuda", dtype: str = "auto"
) -> ModelSpec:
    """Read a model's settings as `load_model` does, without its weights.

    The device need not exist on this machine. Files that `load_model` would refuse are refused here
    too. A directory with only the settings is accepted; then weights and tokenizer are not checked.

    Args:
        id_or_path, revision, dtype: as for `load_model`.
        device_type: "cuda" or "cpu". It decides dtype "auto", for "cpu" with this machine's
            processor.

    Raises:
        NotFound, Unsupported, InvalidArgument: as `load_model` does.
    """
    dtypes.check(dtype)
    gguf = gguf_file.open_model(id_or_path)
    if gguf is None:
        directory = locate.directory(id_or_path, revision, weights=False)
    else:
        directory = gguf.header.path.parent
    config = read_settings(id_or_path, directory, gguf)
    chosen = dtypes.choose(dtype, device_type, config)
    module = empty_module(id_or_path, config, chosen.dtype)
    stored = None
    if gguf is not None:
        gguf.places(module)
        gguf.vocabulary()
    elif locate.has_weights(directory):
        stored = read_headers(id_or_path, directory, config, module)
        read_tokenizer(id_or_path, directory, config)
        check_generation_settings(id_or_path, directory)
    return ModelSpec(
        shape=shape_of(config),
        architecture=config.architectures[0],
        device_type=device_type,
        dtype=chosen.dtype,
        dtype_reason=chosen.reason,
        module=module,
        directory=directory,
        stored=stored,
        gguf=gguf,
    )


def read_settings(id_or_path: str, directory: Path, gguf: gguf_file.GgufModel | None = None) -> Any:
    """Read a model's settings as a transformers configuration, and check them.

    If `gguf` is given, the settings are those of the GGUF file.
    Raises NotFound or Unsupported.
    """
    if gguf is not None:
        families.refuse_unsupported(id_or_path, gguf.config)
        return gguf.config
    families.refuse_by_name(id_or_path, locate.settings(id_or_path, directory))
    if (directory / "adapter_config.json").is_file():
        raise Unsupported(
            f"model {id_or_path!r} comes with an adapter (adapter_config.json); supported: weights "
            "with the adapter merged into them"
        )
    with reading(id_or_path, "config.json"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    families.refuse_unsupported(id_or_path, config)
    if "quantization_config" in vars(config):
        # The value is null here, and transformers 5.2 cannot load null.
        del config.quantization_config
    if config.dtype not in (None, *DTYPES.values()):
        raise Unsupported(
            f"model {id_or_path!r} has dtype {config.dtype} in config.json; accepted: "
            f"{', '.join(DTYPES)}"
        )
    return config


def empty_module(id_or_path: str, config: Any, dtype: torch.dtype) -> Any:
    """Build the model of a configuration on the meta device: sizes and dtypes without data.

    Raises NotFound if transformers cannot build it, and Unsupported if transformers builds another
    family than the configuration names.
    """
    with reading(id_or_path, "config.json"), torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    # transformers chooses the class by model_type, which may disagree with architectures.
    if type(module).__name__ != config.architectures[0]:
        raise Unsupported(
            f"model {id_or_path!r} calls itself a {config.architectures[0]}, but its model_type "
            f"{config.model_type!r} makes it a {type(module).__name__}"
        )
    return module


def read_headers(
    id_or_path: str, directory: Path, config: Any, module: Any
) -> Mapping[str, Stored]:
    """Read the headers of a model's weight files; raise as `checkpoint.check`."""
    stored = checkpoint.headers(locate.weight_files(id_or_path, directory))
    checkpoint.check(id_or_path, module, stored, lambda: _rotations(config, module))
    return stored


def _rotations(config: Any, module: Any) -> Sequence[Tensor]:
    """Return the frequencies of a model's rotation, [rotated dimensions / 2], scaled and unscaled:
    files from older versions of transformers hold unscaled frequencies."""
    scaled: Tensor = type(module.get_decoder().rotary_emb)(config).inv_freq
    count = scaled.shape[-1]
    exponents = torch.arange(count, dtype=torch.float64) / count
    return scaled, config.rope_parameters["rope_theta"] ** -exponents


def read_tokenizer(id_or_path: str, directory: Path, config: Any) -> Any:
    """Read a model's transformers tokenizer.

    Raises NotFound if it cannot be read, and Unsupported if it is not a fast tokenizer or has ids
    beyond the model's vocabulary.
    """
    # Without these files, some versions of transformers return an empty tokenizer.
    if not any((directory / file).is_file() for file in _TOKENIZERS):
        raise NotFound(
            f"model {id_or_path!r}: no tokenizer in {directory}; accepted: one of "
            f"{', '.join(_TOKENIZERS)}"
        )
    with reading(id_or_path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise Unsupported(f"model {id_or_path!r}: only fast tokenizers (tokenizer.json) stream")
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise NotFound(f"model {id_or_path!r}: its tokenizer is empty; is tokenizer.json missing?")
    # Fine-tuned models often add a padding token without an embedding.
    vocabulary.pop(tokenizer.pad_token, None)
    last = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[last] >= config.vocab_size:
        raise Unsupported(
            f"model {id_or_path!r}: its tokenizer has token {last!r} of id {vocabulary[last]}, and "
            f"vocab_size is {config.vocab_size} in config.json; accepted: ids below that; use the "
            "model's own tokenizer"
        )
    return tokenizer


def check_generation_settings(id_or_path: str, directory: Path) -> None:
    """Raise NotFound if there is a generation_config.json and it cannot be read."""
    if (directory / "generation_config.json").is_file():
        with reading(id_or_path, "generation_config.json"):
            GenerationConfig.from_pretrained(directory)


def read_eos_token_ids(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Read the end-of-sequence tokens of settings, generation settings and tokenizer."""
    named = [config.eos_token_id, tokenizer.eos_token_id]
    if (directory / "generation_config.json").is_file():
        named.append(GenerationConfig.from_pretrained(directory).eos_token_id)
    found: set[int] = set()
    for ids in named:
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    # In some settings, a negative number means that there is none.
    return frozenset(index for index in found if index >= 0)


@contextmanager
def reading(id_or_path: str, part: str) -> Iterator[None]:
    """Turn any error that a library raises for a broken checkpoint into one NotFound sentence.

    transformers' own log is off meanwhile: its warnings concern problems that we check ourselves,
    and the user should see one line.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    except A2SFError:
        raise
    # A library may raise any exception for a damaged file.
    except Exception as error:
        raise NotFound(
            f"model {id_or_path!r}: {part} cannot be read ({one_line(error)}); correct it, or "
            "download the checkpoint again"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


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
