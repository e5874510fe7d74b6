"""Finds a model's files: the packaged model, a directory, or the Hugging Face hub.

Owns the search and its error messages. Of the files' contents it reads only config.json and the
list of weight files.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from a2sf import reference
from a2sf.errors import NotFound, first_line, one_line
from a2sf.tablefile import refuse_constant

REFERENCE = "reference"
"""The name of the packaged model."""

_SETTINGS = ["*.json"]
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth"]
_FILES = [*_SETTINGS, "*.safetensors", "*.model", "*.jinja"]


def directory(id_or_path: str, revision: str | None, *, weights: bool = True) -> Path:
    """Find a model's directory: the packaged one, a local one, or a download from the hub.

    Without `weights`, no weights are downloaded; already downloaded ones stay.

    Raises NotFound, with what we looked for and what is accepted.
    """
    if id_or_path == REFERENCE:
        return reference.path()
    local = Path(id_or_path).expanduser()
    if local.is_dir():
        return local
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", id_or_path):
        raise NotFound(
            f"model {id_or_path!r}: no such directory; accepted: {REFERENCE}, a directory with "
            "config.json and *.safetensors, a GGUF file, or a Hugging Face hub id such as org/name"
        )
    try:
        return Path(
            snapshot_download(
                id_or_path,
                revision=revision,
                allow_patterns=_FILES if weights else _SETTINGS,
                # Some repositories store the weights a second time in this format.
                ignore_patterns=["consolidated*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise NotFound(
            f"model {id_or_path!r}: no such directory, and the download from the Hugging Face hub "
            f"failed ({first_line(error)}); accepted: {REFERENCE}, a directory, or a hub id"
        ) from error


def public_name(id_or_path: str, directory: Path) -> str:
    """Return the model's name for people: a hub id, or a local folder's name.

    A local path must not leak.
    """
    local = id_or_path != REFERENCE and Path(id_or_path).is_dir()
    return directory.resolve().name if local else id_or_path


def settings(name: str, directory: Path) -> dict[str, Any]:
    """Read config.json.

    Raises NotFound if it does not exist or is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise NotFound(
            f"model {name!r}: no config.json in {directory}; accepted: a directory with "
            "config.json and *.safetensors"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise NotFound(f"model {name!r}: config.json cannot be read ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise NotFound(f"model {name!r}: config.json is not a JSON object")
    return found


def has_weights(directory: Path) -> bool:
    """Whether the directory holds weights of any format; a plan needs none."""
    return any(path for kind in _WEIGHTS for path in directory.glob(kind))


def weight_files(name: str, directory: Path) -> list[Path]:
    """The weight files that transformers would read; the directory may hold more.

    Raises NotFound if there are none, or if a file in the index is missing.
    """
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise NotFound(
            f"model {name!r}: no *.safetensors in {directory} that are named model.safetensors or "
            f"listed in {index.name}; other formats are not read"
        )
    try:
        listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        beside = bool(listed) and all(Path(file).name == file for file in listed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotFound(
            f"model {name!r}: {index.name} cannot be read ({one_line(error)})"
        ) from error
    if not beside:
        raise NotFound(
            f"model {name!r}: {index.name} lists {listed}; accepted: files in the same directory"
        )
    missing = [file for file in listed if not (directory / file).is_file()]
    if missing:
        raise NotFound(f"model {name!r}: weights are missing: {', '.join(missing)}")
    return [directory / file for file in listed]
