"""Whether a checkpoint's files hold what the model takes, no more and no less.

Owns reading the headers of safetensors files, and what is refused by them before any weight is
read: tensors that nothing takes, that are missing, of another shape, or of numbers that are not
served. Knows nothing of transformers: a model is any torch module, best on the meta device.
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
"""Kinds of numbers that weights are served from, by their names in safetensors."""

_LISTED = 5
"""The most tensors that a message names."""

_FREQUENCIES = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Stored:
    """A tensor as a file's header tells it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it, such as BF16."""


def headers(paths: Sequence[Path]) -> dict[str, Stored]:
    """Read which tensors the files hold, and no weights.

    Raises NotFound where a file cannot be read or is not whole, and Unsupported where two files
    hold the same tensor.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    piece = file.get_slice(name)
                    if name in found:
                        raise Unsupported(
                            f"weights {path}: {name} is stored in {found[name].path.name} too; "
                            "accepted: each tensor once"
                        )
                    found[name] = Stored(path, tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise NotFound(f"weights {path}: not whole ({first_line(error)})") from error
    return found


def check(
    name: str,
    module: Any,
    stored: Mapping[str, Stored],
    rotations: Callable[[], Sequence[Tensor]],
) -> None:
    """Raise unless the files hold exactly the tensors of the model.

    Two kinds of tensors are left over and harmless. An output head that is tied to the embeddings
    may be stored a second time, if it is equal to them. Older files store the frequencies of the
    rotation, which are computed from the settings; they are compared.

    Args:
        name: what the model was asked for by.
        module: the model, on any device; of its tensors only names, shapes and ties are looked at.
        stored: what `headers` gave.
        rotations: gives the frequencies, [rotated dimensions / 2] each, that stored ones may be
            equal to; called where there are stored ones.

    Raises:
        NotFound: tensors are missing.
        Unsupported: tensors that the model does not take, or takes in another shape, or that are
            not stored as floats.
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
            f"model {name!r} stores tensors that its settings have no place for: {_some(unknown)}; "
            "accepted: the weights of the model that config.json describes and no others; merge "
            "adapters, and correct config.json where it leaves out biases or layers"
        )
    ties: dict[int, list[str]] = {}
    for tensor, weight in wanted.items():
        ties.setdefault(id(weight), []).append(tensor)
    missing = [tied[0] for tied in ties.values() if not any(tensor in stored for tensor in tied)]
    if missing:
        raise NotFound(f"model {name!r}: weights are missing: {_some(sorted(missing))}")
    shapes = [
        f"{tensor} is {list(stored[tensor].shape)} where {list(weight.shape)} is taken"
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
        # They were rounded to the dtype that the checkpoint was saved in.
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
