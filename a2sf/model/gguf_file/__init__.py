"""GGUF files as models: one file with settings, vocabulary and weights, often quantised.

Owns finding the file, and its conversion for transformers: a configuration, weights by their names
in transformers, a tokenizer, and the inputs of the fingerprint. Weights are unpacked to a plain
dtype, one tensor at a time. Knows nothing of attention or of devices.

transformers reads GGUF files too (`gguf_file=`), but it silently ignores what it does not know (a
scaled rotation, biases, the pre-tokenizer rule) and reads the header three times. So only the
`gguf` library is used here; the tests compare with transformers.
"""

from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from a2sf.errors import NotFound, Unsupported
from a2sf.model.locate import REFERENCE

if TYPE_CHECKING:
    from a2sf.model.gguf_file.header import Header

SUFFIX = ".gguf"

_KEY_PROJECTION = "blk.{}.attn_k.weight"


def open_model(id_or_path: str) -> "GgufModel | None":
    """Read the header of a model's GGUF file; None if the model is not a GGUF file.

    Raises:
        NotFound: there is no such file, a directory holds several, or the file is truncated.
        Unsupported: this program would run the model wrongly.
    """
    path = _find(id_or_path)
    return None if path is None else GgufModel(id_or_path, path)


def _find(id_or_path: str) -> Path | None:
    path = Path(id_or_path).expanduser()
    if id_or_path == REFERENCE:
        return None
    if path.is_dir():
        if (path / "config.json").exists():
            return None
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
        if len(files) > 1:
            raise NotFound(
                f"model {id_or_path!r}: {len(files)} GGUF files are in this directory; give one by "
                f"its path, such as {files[0].name}"
            )
        return files[0] if files else None
    if path.suffix.lower() != SUFFIX:
        return None
    if not path.is_file():
        raise NotFound(f"model {id_or_path!r}: no such file")
    return path


class GgufModel:
    """A model in a GGUF file. Only the header is read."""

    def __init__(self, name: str, path: Path) -> None:
        """Read the header of the file at `path`; `name` is the user's name for the model.

        Raises NotFound or Unsupported, with the reason.
        """
        if find_spec("gguf") is None:
            raise Unsupported(
                f"model {name!r}: GGUF files are read with the gguf library; install "
                "a2sf-serve[gguf]"
            )
        from a2sf.model.gguf_file import header
        from a2sf.model.gguf_file.settings import configuration
        from a2sf.model.gguf_file.vocabulary import rule_of

        self._name = name
        self.header: Header = header.Header(name, path)
        self.config: Any = configuration(name, self.header)
        """The transformers configuration."""
        rule_of(name, self.header)

    @property
    def id(self) -> str:
        """The model's id: the file's name, plus the quantisation if the name lacks it."""
        from gguf import LlamaFileType

        stem = self.header.path.stem
        known: dict[Any, str] = {kind.value: kind.name for kind in LlamaFileType}
        kind = known.get(self.header.settings.get("general.file_type"), "")
        short = kind.removeprefix("MOSTLY_").removeprefix("ALL_")
        return stem if short.lower() in stem.lower() else f"{stem}.{short}"

    @property
    def parameters(self) -> int:
        """Number of parameters, by the header."""
        from a2sf.model.gguf_file.settings import ROPE_FACTORS

        stored = self.header.tensors.items()
        return sum(prod(tensor.shape) for name, tensor in stored if name != ROPE_FACTORS)

    def key_starts(self, count: int) -> dict[int, bytes]:
        """The first `count` bytes of every layer's key projection, as stored."""
        names = {n: _KEY_PROJECTION.format(n) for n in range(self.config.num_hidden_layers)}
        return {
            layer: self.header.first_bytes(name, count)
            for layer, name in names.items()
            if name in self.header.tensors
        }

    def load(self, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
        """Make the transformers model in `dtype`; return it and transformers' loading info.

        `options` are those of `from_pretrained`. Raises as `places`, before weights are read.
        """
        from a2sf.model.gguf_file.weights import state_dict

        made = getattr(transformers, self.config.architectures[0])
        with torch.device("meta"):
            where = self.places(made(self.config))
        module, loading_info = made.from_pretrained(
            None,
            config=self.config,
            state_dict=state_dict(self.header, self.config, where, dtype),
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
        return module, loading_info

    def places(self, module: Any) -> dict[str, str]:
        """Return the name in `module` (on any device) of each of the file's tensors.

        Raises Unsupported if a tensor has no place in `module`, and NotFound if one is missing.
        """
        from a2sf.model.gguf_file.weights import places

        return places(self._name, self.header, module)

    def vocabulary(self) -> Any:
        """Read the tokens. Raises NotFound or Unsupported."""
        from a2sf.model.gguf_file.vocabulary import Vocabulary

        return Vocabulary(self._name, self.header)
