"""A GGUF file's header is read as in the gguf library, and truncated files are refused."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter

from a2sf.errors import NotFound, Unsupported
from a2sf.model.gguf_file.header import Header, Strings
from tests.gguf_files import save_checkpoint, save_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    checkpoint = save_checkpoint(directory / "checkpoint")
    return save_gguf(checkpoint, directory / "tiny.gguf", kind=GGMLQuantizationType.Q8_0)


def test_settings_and_tensors_equal_those_of_the_library(path: Path) -> None:
    header, reader = Header("m", path), GGUFReader(path)
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        mine = header.settings[key]
        if isinstance(mine, Strings):
            mine = header.strings(key)
        assert mine == field.contents(), key
    assert header.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        want = gguf.dequantize(tensor.data, tensor.tensor_type)
        mine = header.read(tensor.name)
        assert header.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(mine, want.reshape(mine.shape))
        assert header.first_bytes(tensor.name, 16) == tensor.data.tobytes()[:16]


def test_any_alignment_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(256)
    for index in range(3):
        writer.add_tensor(f"t{index}", np.full((2, 5), index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = Header("m", tmp_path / "m.gguf")
    assert [float(header.read(f"t{index}").mean()) for index in range(3)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.99])
def test_truncated_files_are_refused_by_name(share: float, path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * share)])
    says = r"cut\.gguf (is not a GGUF file|is truncated or damaged|cannot be read)"
    with pytest.raises(NotFound, match=says) as caught:
        Header("m", cut)
    assert "\n" not in str(caught.value)


def test_wrong_lengths_are_refused(path: Path, tmp_path: Path) -> None:
    lying = tmp_path / "lying.gguf"
    for field in (8, 16, 24):  # number of tensors, number of settings, length of the first key
        content = bytearray(path.read_bytes())
        content[field : field + 8] = struct.pack("<Q", 2**62)
        lying.write_bytes(content)
        with pytest.raises(NotFound, match="is truncated or damaged"):
            Header("m", lying)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(NotFound, match=r"m\.gguf is not a GGUF file"):
        Header("m", tmp_path / "m.gguf")


def test_old_versions_and_big_endian_files_are_refused_by_name(path: Path, tmp_path: Path) -> None:
    old = bytearray(path.read_bytes())
    old[4:8] = struct.pack("<I", 1)
    (tmp_path / "old.gguf").write_bytes(old)
    with pytest.raises(Unsupported, match=r"GGUF version 1; supported: little-endian .* 2 or 3"):
        Header("m", tmp_path / "old.gguf")
    writer = GGUFWriter(tmp_path / "big.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(Unsupported, match=r"big\.gguf is big-endian"):
        Header("m", tmp_path / "big.gguf")


def test_a_part_of_a_split_file_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    named = tmp_path / "m-00001-of-00003.gguf"
    named.write_bytes(path.read_bytes())
    with pytest.raises(Unsupported, match=r"one of 3 parts; .* llama-gguf-split --merge"):
        Header("m", named)
    renamed = save_gguf(
        save_checkpoint(tmp_path / "checkpoint"), tmp_path / "m.gguf", split__count=2
    )
    with pytest.raises(Unsupported, match="one of 2 parts"):
        Header("m", renamed)


@pytest.mark.parametrize(("number", "name"), [(24, "I8"), (4, "type 4"), (999, "type 999")])
def test_an_unsupported_tensor_type_is_refused_by_name(
    number: int, name: str, path: Path, tmp_path: Path
) -> None:
    # The type of the first tensor follows its name and two sizes.
    content = bytearray(path.read_bytes())
    tensor = GGUFReader(path).tensors[0]
    at = content.index(tensor.name.encode(), 1000) + len(tensor.name) + 4 + 8 * len(tensor.shape)
    content[at : at + 4] = struct.pack("<I", number)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(Unsupported, match=f"tensor {tensor.name} is stored as {name}, which"):
        Header("m", tmp_path / "m.gguf")
