"""The alpha table's file: written atomically, and checked when it is read.

Owns the canonical form and its digest, the upgrades from older versions, and reading and writing
the file. Knows nothing of the meaning of the fields.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from a2sf.errors import (
    NotFound,
    TableCorrupt,
    TableInvalid,
    TableMismatch,
    TableTooNew,
    first_line,
)
from a2sf.schema import SCHEMA_VERSION, AlphaTable, ModelIdentity
from a2sf.validation import first_problem

MAX_FILE_BYTES = 16 * 2**20
"""Larger files are refused without reading them. Tables of known models are below 1 MiB."""


def canonical_json(document: Mapping[str, Any]) -> str:
    """Return `document` in the form that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def canonical_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the canonical JSON, as UTF-8, of `document` without its `sha256`."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def seal(**fields: Any) -> AlphaTable:
    """Build a table of the newest version from its fields; adds the version and the digest.

    Raises TableInvalid if a field is missing, unknown or out of range.
    """
    try:
        draft = AlphaTable(schema_version=SCHEMA_VERSION, sha256="0" * 64, **fields)
    except ValidationError as error:
        raise TableInvalid(f"alpha table: {first_problem(error)}") from error
    return draft.model_copy(update={"sha256": canonical_digest(draft.model_dump(mode="json"))})


def save_table(table: AlphaTable, path: Path) -> None:
    """Write `table` to `path`. A reader sees the old file or the new one, never a part."""
    document = table.model_dump(mode="json")
    assert canonical_digest(document) == table.sha256, "tables are built with seal()"
    write_whole(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old one or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives only the owner access, but other users, such as servers, read the file.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _from_1(document: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had equal slots in every layer, and neither stages nor p-values."""
    policy = document.get("policy")
    alpha = policy.get("alpha") if isinstance(policy, dict) else None
    layers = len(alpha) if isinstance(alpha, list) else 0
    brought: dict[str, dict[str, Any]] = {
        "policy": {"layer_share": [1.0] * layers},
        "evidence": {"p_holm": {}, "uniform": None},
        "search": {"stages": []},
    }
    # Parts that are not objects stay; the checks of the fields name them.
    parts = {name: document.get(name) for name in brought}
    return document | {
        name: {**part, **brought[name]} for name, part in parts.items() if isinstance(part, dict)
    }


def _from_2(document: dict[str, Any]) -> dict[str, Any]:
    """Version 2 had equal slots in the heads of a layer, no `lost_nll`, and no `min_budget`."""
    # Parts that are missing or not objects stay; the checks of the fields name them.
    evidence, policy = document.get("evidence"), document.get("policy")
    if isinstance(evidence, dict):
        document = document | {"evidence": evidence | {"lost_nll": None}}
    if isinstance(policy, dict):
        policy = policy | {"min_budget": None}
        if "layer_share" in policy:
            shares = _shares_by_head(policy.pop("layer_share"), policy.get("alpha"))
            policy["head_share"] = shares
        document = document | {"policy": policy}
    return document


def _shares_by_head(shares: Any, alpha: Any) -> Any:
    """Return each layer's share once per head; `alpha` has one number per head."""
    if not isinstance(shares, list) or not isinstance(alpha, list) or len(shares) != len(alpha):
        return shares
    return [
        [share] * (len(row) if isinstance(row, list) else 1)
        for share, row in zip(shares, alpha, strict=True)
    ]


UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2}
"""Version n: the step that turns a document of version n into one of version n + 1.

A step does not set `schema_version` and `sha256`; `upgrade` does.
"""


def upgrade(
    document: dict[str, Any],
    steps: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = UPGRADES,
    current: int = SCHEMA_VERSION,
) -> dict[str, Any]:
    """Upgrade `document` to version `current`, one step at a time, and set its new digest.

    Raises TableTooNew for a version above `current`, and TableInvalid for a version that is not a
    positive integer or has no step.
    """
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise TableInvalid(f"schema_version is {version!r}; accepted: 1 to {current}")
    if version > current:
        raise TableTooNew(
            f"schema_version is {version}, and this program reads up to {current}; "
            "upgrade a2sf-serve or fit the table again"
        )
    while version < current:
        if version not in steps:
            raise TableInvalid(
                f"schema_version {version} is no longer supported; fit the table again"
            )
        document = {**steps[version](document), "schema_version": version + 1}
        version += 1
        document["sha256"] = canonical_digest(document)
    return document


def parse_table(data: bytes) -> AlphaTable:
    """Read a table from the bytes of its file; check the digest, the version and every field.

    The table's digest is that of its canonical form. It equals the file's digest if the file has
    every field of the newest version.

    Raises TableCorrupt, TableTooNew or TableInvalid.
    """
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TableCorrupt(f"not whole JSON, perhaps cut short: {first_line(error)}") from error
    if not isinstance(document, dict):
        raise TableCorrupt("not a JSON object")
    # A newer version may define its digest in another way, so check the version first.
    version = document.get("schema_version")
    if not (isinstance(version, int) and version > SCHEMA_VERSION):
        try:
            digest = canonical_digest(document)
        except (ValueError, RecursionError) as error:
            # Python reads more than JSON allows: 1e999, half of a surrogate pair.
            raise TableCorrupt(
                f"has a value that JSON cannot represent: {first_line(error)}"
            ) from error
        if document.get("sha256") != digest:
            raise TableCorrupt(
                f"the file says sha256 {document.get('sha256')!r}, and its content has {digest!r}; "
                "the file was changed or damaged after it was written"
            )
    try:
        # Strict validation accepts JSON arrays as tuples, and strings as times, only if it reads
        # the JSON itself.
        table = AlphaTable.model_validate_json(json.dumps(upgrade(document)))
    except ValidationError as error:
        raise TableInvalid(first_problem(error)) from error
    # A file may omit a field that may be null, or write 1 for 1.0. The digest is that of the
    # canonical form.
    return table.model_copy(update={"sha256": canonical_digest(table.model_dump(mode="json"))})


def load_table(path: Path, identity: ModelIdentity | None = None) -> AlphaTable:
    """Read and check the table at `path`, also against the model of `identity` if one is given.

    Raises NotFound, TableCorrupt, TableTooNew, TableInvalid or TableMismatch; each message names
    the file.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TableInvalid(f"alpha table {path}: larger than {MAX_FILE_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise NotFound(f"alpha table {path}: {error.strerror or error}") from error
    try:
        table = parse_table(data)
        if identity is not None:
            table.check_model(identity)
    except (TableCorrupt, TableTooNew, TableInvalid, TableMismatch) as error:
        raise type(error)(f"alpha table {path}: {error}") from error
    return table


def refuse_constant(name: str) -> float:
    """Refuse NaN and infinities, which Python's JSON reader accepts; a `parse_constant`."""
    raise ValueError(f"{name} is not JSON")
