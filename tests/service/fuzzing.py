"""What is fuzzed: functions of bytes that return when all is well and raise when it is not.

Each returns whether the bytes were a case at all: a message, or a JSON object.

Owns the targets, what they need around them, and what a failure on the wire must be like. Knows
nothing of where the bytes come from.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from a2sf.engine import admission
from a2sf.engine.config import EngineConfig
from a2sf.errors import A2SFError, TableError
from a2sf.model.loader import LoadedModel, load_model
from a2sf.policy import CachePolicy
from a2sf.requests import Started
from a2sf.tablefile import canonical_digest, parse_table
from service.backend.tables import TableStore
from service.pb import inference_pb2 as pb
from service.rpc.conversions import descriptions, requests, responses
from service.status import WireStatus, to_wire
from tests.tables import IDENTITY, make_table
from tests.tiny import save_tiny_llama

MAX_METADATA_BYTES = 8192
"""What gRPC's clients take of a call's trailers; they see none of more."""

ENTRY_BYTES = 32
"""What HTTP/2 counts for each header besides its name and value."""

MAX_PROMPT_BYTES = 2048

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'ghost' %}{{ raise_exception(m.content) }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class World:
    """What requests are read against."""

    model: LoadedModel
    config: EngineConfig
    store: TableStore


@cache
def world() -> World:
    """Make a tiny model with a chat template, and a table for it."""
    with tempfile.TemporaryDirectory() as directory:
        model = load_model(str(save_tiny_llama(Path(directory))), device="cpu", dtype="float32")
    model.tokenizer.chat_template = TEMPLATE
    config = EngineConfig(slots=64, default_policy=CachePolicy(preset="h2o", budget=32))
    return World(model, config, TableStore({"made-up": make_table(model.identity)}))


def request_target(data: bytes) -> bool:
    """Read a request as the service does, up to the first event of its answer."""
    message = pb.GenerationInput()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return False
    try:
        started = _admitted(message)
    except A2SFError as error:
        check_status(to_wire(error, "r" * 128))
    else:
        assert started.SerializeToString()
    return True


def _admitted(message: pb.GenerationInput) -> pb.GenerationStarted:
    here = world()
    request, prompt = requests.read_request(
        message,
        here.store,
        here.model,
        request_id=requests.valid_request_id(message) or "made-up",
        max_prompt_bytes=MAX_PROMPT_BYTES,
    )
    with requests.proto_fields():
        policy = admission.check(request, here.model, here.config)
    seed = request.sampling.seed or 0
    return responses.ResponseBuilder(message.output, prompt, here.model).started(
        Started(
            request_id=request.request_id,
            policy=policy,
            prompt_tokens=len(prompt.token_ids),
            seed=seed,
        )
    )


def table_target(data: bytes) -> bool:
    """Read a table's file, as it is and again with the digest that its content should have."""
    _read_table(data)
    try:
        document = json.loads(data)
        sealed = json.dumps({**document, "sha256": canonical_digest(document)})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False
    _read_table(sealed.encode())
    return True


def _read_table(data: bytes) -> None:
    refused: dict[str, TableError] = {}
    try:
        table = parse_table(data)
        table.check_model(IDENTITY)
    except TableError as error:
        check_status(to_wire(error, "r" * 128))
        refused["t"] = error
    else:
        assert descriptions.table_message(table).SerializeToString()
    listed = TableStore({} if refused else {table.name: table}, refused)
    assert descriptions.table_list_message(listed).SerializeToString()


def check_status(status: WireStatus) -> None:
    """Check that a failure is the caller's, and reaches a client whole."""
    assert status.code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), status
    size = ENTRY_BYTES + len("grpc-message") + _percent_encoded(status.details)
    for key, value in status.trailers:
        # Binary values may be sent as base64.
        size += ENTRY_BYTES + len(key) + (len(value) + 2) // 3 * 4
    assert size < MAX_METADATA_BYTES, f"{size} bytes: {status.details[:200]}"


def _percent_encoded(text: str) -> int:
    return sum(1 if 0x20 <= byte < 0x7F and byte != ord("%") else 3 for byte in text.encode())


TARGETS: Mapping[str, Callable[[bytes], bool]] = {
    "request": request_target,
    "table": table_target,
}
