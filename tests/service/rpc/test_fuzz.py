"""No bytes make the request converter or the table loader fail in a way that is not theirs.

The fast tests build what is almost right; the slow ones let coverage find its own way, each through
100,000 cases.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from service.pb import inference_pb2 as pb
from tests.service.fuzzing import TARGETS, request_target, table_target
from tests.tables import IDENTITY, fitted_table, make_table, version_1

CASES = 100_000
MAX_BYTES = 8192
LIMIT_S = 300

ROOT = Path(__file__).resolve().parents[3]

# Values about the limits that there are, and about those of the types.
INTEGERS = [0, 1, 2, 4, 5, 20, 21, 31, 32, 33, 63, 64, 65, 128, 257, 258, 511, 512, 2**31 - 1]
REALS = [0.0, -0.0, 0.01, 0.5, 1.0, math.nextafter(1, 2), 100.0, -1.0, 5e-324, 1e308]
REALS += [math.nan, math.inf, -math.inf]
STRINGS = ["", "x", "made-up", "user", "assistant", "ghost", "a\nb", "../../etc/passwd", "\0"]
STRINGS += ["x" * 256, "x" * 257, "\N{FOX FACE}" * 400, "%" * 3000, "made-up\n"]

WIDTHS = {FieldDescriptor.TYPE_UINT32: 32, FieldDescriptor.TYPE_UINT64: 64}


def values(one: FieldDescriptor) -> SearchStrategy[Any]:
    """What may stand in this field: near its limits, and anything."""
    if one.message_type is not None:
        return messages(one.message_type)
    if one.enum_type is not None:
        return st.integers(-1, 7)
    if one.type == one.TYPE_BOOL:
        return st.booleans()
    if one.type == one.TYPE_STRING:
        return st.sampled_from(STRINGS) | st.text(max_size=20)
    if one.type == one.TYPE_DOUBLE:
        return st.sampled_from(REALS) | st.floats()
    most = 2 ** WIDTHS[one.type] - 1
    return st.sampled_from([*INTEGERS, most]) | st.integers(0, most)


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor) -> Message:
    """A message of any type with some of its fields set, however unlikely."""
    message: Message = GetMessageClass(descriptor)()
    for one in draw(st.lists(st.sampled_from(list(descriptor.fields)), max_size=6)):
        if one.is_repeated:
            some = draw(st.lists(values(one), max_size=5)) * draw(st.sampled_from([1, 1, 1, 40]))
            getattr(message, one.name).extend(some)
        elif one.message_type is not None:
            getattr(message, one.name).MergeFrom(draw(values(one)))
        else:
            setattr(message, one.name, draw(values(one)))
    return message


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request that is good but for what is drawn over it."""
    message = pb.GenerationInput(text="x", max_new_tokens=4)
    message.MergeFrom(draw(messages(pb.GenerationInput.DESCRIPTOR)))
    return message.SerializeToString()


TABLES = [
    json.loads(table.model_dump_json()) for table in (make_table(IDENTITY), fitted_table(IDENTITY))
] + [version_1(IDENTITY)]

deep: Any = []
for _ in range(200):
    deep = [deep]

ODD: list[Any] = [None, True, -1, 0, 1, 2.0, 0.5, 2**31, 2**32, 2**40, 10**400, 1e308, 5e-324]
ODD += [math.nan, math.inf, "", "x", "x" * 2000, "\ud800", "\N{FOX FACE}" * 999, "é\n\0", [], {}]
ODD += [{"\ud800": 1}, [[0.5]], [0.5] * 500, {"a": {"a": {}}}, deep, "0" * 64, "2026-01-01"]
ODD += ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01T00:00:00Z"]


def sources(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder in a document, with each of its keys."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(part, dict | list):
            yield from sources(part)


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """A table's file with some of its values replaced, left out or named otherwise."""
    document = deepcopy(draw(st.sampled_from(TABLES)))
    odd = st.sampled_from(ODD).map(deepcopy) | st.floats() | st.integers()
    for _ in range(draw(st.integers(0, 3))):
        holder, key = draw(st.sampled_from(list(sources(document))))
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
            case "replace":
                holder[key] = draw(odd)
            case "remove":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(STRINGS))] = draw(odd)
    text = json.dumps(document, ensure_ascii=draw(st.booleans()))
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"])), "replace")


STRATEGIES = {"request": requests(), "table": tables()}

NESTED = 100_000

TRAPS: dict[str, bytes] = {
    "nothing": b"",
    "lists in lists": b"[" * NESTED,
    "objects in objects": b'{"a":' * NESTED,
    "lists that are closed again": b'{"a":' + b"[" * 950 + b"]" * 950 + b"}",
    "objects that are closed again": b'{"a":' * 950 + b"1" + b"}" * 950,
    "a number of many digits": b'{"schema_version":' + b"9" * 4000 + b"}",
    "a number of too many digits": b'{"schema_version":' + b"9" * 10_000 + b"}",
    "a number beyond all": b'{"a":1e999}',
    "no number": b'{"a":NaN}',
    "half a character": b'{"a":"\\ud800"}',
    "half a character as a name": b'{"\\udfff":1}',
    "a name twice": b'{"schema_version":2,"schema_version":1}',
    "a version in words": b'{"schema_version":"' + b"2" * 9000 + b'"}',
    "a long digest": b'{"schema_version":2,"sha256":"' + b"\xc3\xa9" * 9000 + b'"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "UTF-32": "{}".encode("utf-32"),
    "no text at all": bytes(range(256)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_json_traps_are_refused_or_read_correctly(name: str) -> None:
    table_target(TRAPS[name])


@pytest.mark.parametrize("document", TABLES, ids=lambda table: table["name"])
def test_a_table_with_a_replaced_value_is_accepted_or_refused(document: dict[str, Any]) -> None:
    whole = deepcopy(document)
    for holder, key in list(sources(whole)):
        right = holder[key]
        for odd in ODD:
            holder[key] = odd
            table_target(json.dumps(whole).encode())
        holder[key] = right


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(data=requests())
def test_a_nearly_valid_request_is_accepted_or_refused(data: bytes) -> None:
    request_target(data)


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(data=tables())
def test_a_nearly_valid_table_is_accepted_or_refused(data: bytes) -> None:
    table_target(data)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_accepted_or_refused(target: str, data: bytes) -> None:
    TARGETS[target](data)


# Stop after this number of decodable inputs: most mutated inputs cannot be decoded.
DRIVER = """
import os
import sys
import atheris
# numba cannot compile instrumented functions.
compiled = [
    *(f"a2sf.native.{name}" for name in ("memory", "products", "team")),
    *(f"a2sf.cache.kernels.{name}" for name in ("walk_programs", "walk_records")),
]
with atheris.instrument_imports(include=["a2sf", "service"], exclude=compiled):
    from tests.service import fuzzing
name, cases, *flags = sys.argv[1:]
left = int(cases)
def target(data):
    global left
    left -= fuzzing.TARGETS[name](data)
    if not left:
        os._exit(0)
fuzzing.world()
atheris.Setup([sys.argv[0], *flags], target)
atheris.Fuzz()
"""


def examples(strategy: SearchStrategy[bytes], count: int) -> list[bytes]:
    found: list[bytes] = []

    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(data: bytes) -> None:
        found.append(data)

    collect()
    return found


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("target", TARGETS)
def test_coverage_guided_inputs_are_accepted_or_refused(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed; it fuzzes by coverage")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, data in enumerate(examples(STRATEGIES[target], 300)):
        if len(data) <= MAX_BYTES:
            (corpus / str(number)).write_bytes(data)
    flags = [f"-max_len={MAX_BYTES}", "-seed=1", "-timeout=20", "-rss_limit_mb=0", "-verbosity=0"]
    if target == "table":
        # Half of what is mutated would be no UTF-8, and read no further.
        flags.append("-only_ascii=1")
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, target, str(CASES), *flags, str(corpus)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
