"""The header of a GGUF file, and its tensors as stored.

Owns the container format: settings, the list of tensors, the location of their bytes, and the
errors of the container. Strings are decoded on demand: the `gguf` library's own reader takes
seconds and hundreds of megabytes for a vocabulary, but a plan needs only its size. The library
defines the tensor types and unpacks tensors. Knows nothing of models.
"""

import mmap
import re
import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray

from a2sf.errors import NotFound, Unsupported

VERSIONS = (2, 3)

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")


@cache
def _unpacked_types() -> frozenset[int]:
    """The tensor types that the library can unpack, found by unpacking a block of zeros of each."""
    unpacked = set()
    for kind in GGMLQuantizationType:
        with suppress(KeyError, NotImplementedError):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            unpacked.add(kind.value)
    return frozenset(unpacked)


@dataclass(frozen=True)
class Strings:
    """An array of strings that is not decoded yet."""

    count: int
    start: int
    """Offset in the file, in bytes, of the first string's length field."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's location in the file, and how it is stored."""

    shape: tuple[int, ...]
    """In torch's order: the contiguous dimension is the last."""
    type: GGMLQuantizationType
    start: int
    nbytes: int


class Header:
    """The header of a file. The file stays memory-mapped."""

    def __init__(self, name: str, path: Path) -> None:
        """Read the header of the file at `path`; `name` is the user's name for the model.

        Raises:
            NotFound: it is not a GGUF file, or it is truncated.
            Unsupported: its version, its byte order or a tensor type is not supported, or it is one
                of several parts.
        """
        self.path = path
        self._name = name
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise NotFound(f"model {name!r}: {path.name} cannot be read ({error})") from error
        self._at = 0
        self._refuse_parts(path.stem)
        if bytes(self._bytes[:4]) != b"GGUF":
            raise NotFound(f"model {name!r}: {path.name} is not a GGUF file")
        self._at = 4
        self.settings: dict[str, Any] = {}
        """Settings by GGUF key; an array of strings is a `Strings`."""
        version = self._scalar("I")
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            said = "is big-endian" if big else f"is of GGUF version {version}"
            raise Unsupported(
                f"model {name!r}: {path.name} {said}; supported: little-endian files of version "
                f"{' or '.join(map(str, VERSIONS))}"
            )
        tensors, settings = self._scalar("Q"), self._scalar("Q")
        for _ in range(settings):
            key = self._string()
            self.settings[key] = self._value(self._scalar("I"))
        if (parts := self.settings.get("split.count", 1)) not in (0, 1):
            self._refuse_part(parts)
        self.tensors = self._tensor_table(tensors)

    def strings(self, key: str) -> list[str] | None:
        """Decode the array of strings under `key`; None if there is none."""
        stored = self.settings.get(key)
        if not isinstance(stored, Strings):
            return None
        self._at = stored.start
        return [self._string() for _ in range(stored.count)]

    def type_counts(self) -> dict[str, int]:
        """Number of tensors of each type, by the type's name."""
        return dict(Counter(tensor.type.name for tensor in self.tensors.values()))

    def first_bytes(self, tensor: str, count: int) -> bytes:
        """The first bytes of a tensor as stored, at most `count`."""
        stored = self.tensors[tensor]
        return bytes(self._bytes[stored.start : stored.start + min(count, stored.nbytes)])

    def read(self, tensor: str) -> NDArray[np.float32]:
        """Unpack a tensor to float32, in its shape."""
        stored = self.tensors[tensor]
        raw = np.frombuffer(self._bytes, np.uint8, stored.nbytes, stored.start)
        # A quantisation block never crosses a row.
        unpacked = dequantize(raw.reshape(*stored.shape[:-1], -1), stored.type)
        return unpacked.reshape(stored.shape)

    def _tensor_table(self, count: int) -> dict[str, StoredTensor]:
        entries: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]] = []
        for _ in range(count):
            name = self._string()
            dimensions = self._scalar("I")
            if dimensions > _MOST_DIMENSIONS:
                raise self._not_whole()
            shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
            kind = self._type(name, self._scalar("I"))
            elements, width = GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % elements:
                raise self._not_whole()
            entries.append((name, shape, kind, self._scalar("Q"), prod(shape) // elements * width))
        alignment = self.settings.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._not_whole()
        start = -(-self._at // alignment) * alignment
        table = {
            name: StoredTensor(shape, kind, start + offset, nbytes)
            for name, shape, kind, offset, nbytes in entries
        }
        if any(t.start + t.nbytes > len(self._bytes) for t in table.values()):
            raise self._not_whole()
        return table

    def _type(self, tensor: str, number: int) -> GGMLQuantizationType:
        if number not in _unpacked_types():
            known = {kind.value: kind.name for kind in GGMLQuantizationType}
            raise Unsupported(
                f"model {self._name!r}: tensor {tensor} is stored as "
                f"{known.get(number, f'type {number}')}, which the gguf library does not unpack; "
                "use a file of another quantisation, such as Q8_0 or Q4_K_M"
            )
        return GGMLQuantizationType(number)

    def _refuse_parts(self, stem: str) -> None:
        if part := _PART.search(stem):
            self._refuse_part(int(part[2]))

    def _refuse_part(self, count: int) -> None:
        raise Unsupported(
            f"model {self._name!r}: {self.path.name} is one of {count} parts; supported: whole "
            "files, which llama-gguf-split --merge makes of parts"
        )

    def _not_whole(self) -> NotFound:
        return NotFound(f"model {self._name!r}: {self.path.name} is truncated or damaged")

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._bytes):
            raise self._not_whole()
        taken = self._bytes[self._at : end]
        self._at = end
        return taken

    def _scalar(self, form: str) -> Any:
        form = "<" + form
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return value

    def _string(self) -> str:
        try:
            return self._take(self._scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._not_whole() from error

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._not_whole()
        element, count = self._scalar("I"), self._scalar("Q")
        if element == _STRING:
            start = self._at
            for _ in range(count):
                self._take(self._scalar("Q"))
            return Strings(count, start)
        if element not in _SCALARS:
            raise self._not_whole()
        form = np.dtype(f"<{_SCALARS[element]}" if element != 7 else "?")
        return np.frombuffer(self._take(count * form.itemsize), form).tolist()
