"""Checks that a checkpoint's files hold exactly the tensors of the model.

Owns reading the headers of safetensors files, and the checks before any weight is read: unknown
tensors, missing tensors, wrong shapes, unsupported number types. Knows nothing of transformers: a
model is any torch module, best on the meta device.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from a2sf.errors import NotFound, Unsupported, first_line

FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Supported number types of stored weights: name in safetensors -> name in torch."""

_LISTED = 5
"""Number of tensors that an error message lists."""

_FREQUENCIES = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Stored:
    """A tensor's entry in a file's header."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """The safetensors name, such as BF16."""


def headers(paths: Sequence[Path]) -> dict[str, Stored]:
    """Read the tensors' entries from the files' headers, without the weights.

    Raises NotFound if a file cannot be read or is truncated, and Unsupported if two files hold the
    same tensor.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    piece = file.get_slice(name)
                    if name in found:
                        raise Unsupported(
                            f"weights {path}: {name} is stored in {found[name].path.name} too; "
                            "accepted: each tensor once"
                        )
                    found[name] = Stored(path, tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise NotFound(f"weights {path}: truncated or damaged ({first_line(error)})") from error
    return found


def check(
    name: str,
    module: Any,
    stored: Mapping[str, Stored],
    rotations: Callable[[], Sequence[Tensor]],
) -> None:
    """Raise unless the files hold exactly the tensors of the model.

    Two kinds of additional tensors are accepted. An output head that is tied to the embeddings may
    be stored too, if it equals them. Older files store the frequencies of the rotation, which are
    computed from the settings; they must equal the computed ones.

    Args:
        name: the name under which the user asked for the model, for messages.
        module: the model, on any device; only names, shapes and ties of its tensors are used.
        stored: the result of `headers`.
        rotations: returns the accepted frequencies, [rotated dimensions / 2] each; called only if
            the files store frequencies.

    Raises:
        NotFound: tensors are missing.
        Unsupported: tensors are unknown to the model, have another shape, or are not stored as
            floats.
    """
    wanted: dict[str, Tensor] = module.state_dict(keep_vars=True)
    odd = [f"{tensor} as {s.dtype}" for tensor, s in stored.items() if s.dtype not in FLOATS]
    if odd:
        raise Unsupported(
            f"model {name!r} stores {_some(odd)}; accepted: weights of {', '.join(FLOATS.values())}"
            "; use a checkpoint that is not quantised"
        )
    extra = [tensor for tensor in stored if tensor not in wanted]
    frequencies = [tensor for tensor in extra if _FREQUENCIES.search(tensor)]
    unknown = sorted(set(extra) - set(frequencies))
    if unknown:
        raise Unsupported(
            f"model {name!r} stores tensors that its config.json has no place for: "
            f"{_some(unknown)}; accepted: only the weights of the model that config.json "
            "describes; merge adapters, and correct config.json if it leaves out biases or layers"
        )
    ties: dict[int, list[str]] = {}
    for tensor, weight in wanted.items():
        ties.setdefault(id(weight), []).append(tensor)
    missing = [tied[0] for tied in ties.values() if not any(tensor in stored for tensor in tied)]
    if missing:
        raise NotFound(f"model {name!r}: weights are missing: {_some(sorted(missing))}")
    shapes = [
        f"{tensor} is {list(stored[tensor].shape)}, expected {list(weight.shape)}"
        for tensor, weight in wanted.items()
        if tensor in stored and stored[tensor].shape != tuple(weight.shape)
    ]
    if shapes:
        raise Unsupported(
            f"model {name!r} stores weights of other shapes than config.json says: {_some(shapes)}"
        )
    for tied in ties.values():
        _refuse_different(name, [(tensor, stored[tensor]) for tensor in tied if tensor in stored])
    if frequencies:
        _refuse_other_frequencies(name, {t: stored[t] for t in frequencies}, rotations())


def _refuse_different(name: str, tied: Sequence[tuple[str, Stored]]) -> None:
    if len(tied) < 2:
        return
    (first, one), *others = tied
    weight = _read(first, one)
    for second, other in others:
        if not torch.equal(weight, _read(second, other)):
            raise Unsupported(
                f"model {name!r} ties {first} and {second}, but stores two that differ; accepted: "
                "equal ones, one of them, or tie_word_embeddings false in config.json"
            )


def _refuse_other_frequencies(
    name: str, stored: Mapping[str, Stored], rotations: Sequence[Tensor]
) -> None:
    for tensor, found in stored.items():
        frequencies = _read(tensor, found)
        # The stored frequencies were rounded to the checkpoint's dtype.
        tolerance = 2 * torch.finfo(frequencies.dtype).eps + 1e-5
        if not any(
            frequencies.shape == rotation.shape
            and torch.allclose(frequencies.double(), rotation.double(), rtol=tolerance, atol=1e-7)
            for rotation in rotations
        ):
            raise Unsupported(
                f"model {name!r} stores {tensor}, which is not the rotation that config.json "
                "describes; correct its rope settings"
            )


def _read(name: str, stored: Stored) -> Tensor:
    with safe_open(stored.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
