"""The alpha table: the versioned file that the tuner writes and the service loads.

Owns the fields and their ranges, the canonical digest, the upgrade chain, and reading and writing
the file safely. Knows nothing of tensors, of how a table is found, or of who asks for it. The JSON
Schema under `proto/` is exported from here (`json_schema`) and a test holds the two equal.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from a2sf.errors import (
    NotFound,
    TableCorrupt,
    TableInvalid,
    TableMismatch,
    TableTooNew,
    first_line,
)

SCHEMA_VERSION: Final = 2

MAX_FILE_BYTES = 16 * 2**20
"""Larger files are refused unread: the largest model in sight needs under 1 MiB."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A table's name: safe as a file's name, so it can never leave the tables' directory."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Alpha = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=0, lt=2**32)]
"""So many tokens as a message can carry."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Frozen(BaseModel):
    """Base of every value that crosses a module: immutable, typed strictly, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelIdentity(Frozen):
    """Which model a table belongs to. Two models with one identity may share tables."""

    id: str = Field(description="The model's name or hub id, for people; not compared on load.")
    revision: str | None = Field(description="The hub revision, where the model came from a hub.")
    architecture: str = Field(description="The transformers class, such as LlamaForCausalLM.")
    num_layers: Positive
    num_attention_heads: Positive = Field(description="Query heads of one layer.")
    num_kv_heads: Positive = Field(description="Key-value heads of one layer.")
    fingerprint: Digest = Field(
        description="SHA-256 over the canonical shape and rope settings and the first 4 KiB of "
        "every k_proj weight (of qkv_proj where those are fused) as stored."
    )

    def difference(self, other: "ModelIdentity") -> str | None:
        """Say how `other` differs in what a table depends on, or None where it does not."""
        for field in ("architecture", "num_layers", "num_attention_heads", "num_kv_heads"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"{field} is {mine!r} in the table and {theirs!r} in the model"
        if self.fingerprint != other.fingerprint:
            return (
                f"the weights differ: fingerprint {self.fingerprint[:12]}... in the table and "
                f"{other.fingerprint[:12]}... in the model"
            )
        return None


class TablePolicy(Frozen):
    """What serving must do so that the table means what it meant when it was fitted."""

    alpha: tuple[tuple[Alpha, ...], ...] = Field(
        min_length=1, description="num_layers lists of num_kv_heads forgetting factors."
    )
    layer_share: tuple[Weight, ...] = Field(
        min_length=1,
        description="num_layers weights by which the slots of all layers are dealt among them: "
        "equal weights give every layer the budget, others more to some at the cost of the rest.",
    )
    budget: Annotated[Tokens, Field(ge=1)] | None = Field(
        default=None, description="Slots a head keeps, in tokens; with layer_share, on average."
    )
    budget_ratio: Ratio | None = Field(
        default=None, description="The same as a share of prompt + max_new tokens."
    )
    recent: Tokens | None = Field(
        default=None, description="Tokens before the newest that are never evicted."
    )
    recent_share: Share | None = Field(
        default=None, description="The same as a share of a layer's slots - sinks - 1, floored."
    )
    sinks: Tokens = Field(description="First tokens of the sequence that are never evicted.")
    prefill_chunk: Tokens = Field(
        description="Tokens of one prompt block; 0 means the whole prompt as one block."
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.budget is None) == (self.budget_ratio is None):
            raise ValueError("give exactly one of budget and budget_ratio")
        if (self.recent is None) == (self.recent_share is None):
            raise ValueError("give exactly one of recent and recent_share")
        return self


class Calibration(Frozen):
    """The data that the alphas were fitted on."""

    dataset: str
    split: str
    examples: Positive
    tokens: Positive
    data_sha256: Digest = Field(description="SHA-256 over the token ids of the examples used.")
    seed: int


class Estimate(Frozen):
    """A mean over examples and its bootstrap interval."""

    mean: Finite
    low: Finite
    high: Finite


class UniformSetting(Frozen):
    """One alpha for all layers and heads, equal slots, and what is protected from eviction."""

    alpha: Alpha
    recent_share: Share
    sinks: Count


class Evidence(Frozen):
    """What the table and its baselines cost on examples that the search never saw."""

    objective: str = Field(description="What the figures measure, with its unit.")
    dataset: str
    split: str
    examples: Positive
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        description="Coverage of every interval here."
    )
    table: Estimate = Field(description="The cost of the fitted per-head table.")
    baselines: dict[str, Estimate] = Field(description="The cost of each baseline, by name.")
    paired: dict[str, Estimate] = Field(
        description="Fitted table minus baseline on the same examples; below 0 the table wins."
    )
    p_holm: dict[str, Share] = Field(
        description="p-value of each paired difference (sign flips, two-sided), corrected by Holm "
        "over all of them; empty in tables from before they were kept."
    )
    uniform: UniformSetting | None = Field(
        description="The best uniform setting, which is the baseline `uniform`; null in tables "
        "from before it was kept."
    )
    verdict: Literal["better", "no_better_than_uniform"] = Field(
        description="better: the paired interval against the best uniform setting lies below 0, "
        "and its corrected p-value is below 1 - confidence. "
        "Otherwise the uniform setting is what the file carries, unless asked otherwise."
    )


class Stage(Frozen):
    """One stage of a search: what it took, and what its best candidate is worth."""

    name: str
    trials: Count = Field(description="Candidates measured, those given up early included.")
    evaluations: NotNegative = Field(
        description="The same in passes over all calibration examples through all layers."
    )
    seconds: NotNegative = Field(description="Time spent on measuring, summed over workers.")
    calibration: Finite = Field(description="Lowest cost on the calibration examples so far.")
    held_out: Estimate = Field(description="What that candidate costs on the held-out examples.")
    paired: Estimate = Field(description="The same minus the best uniform setting's, paired.")


class Search(Frozen):
    """How the alphas were found."""

    sampler: str
    trials: Count
    study: str
    storage: str = Field(description="Kind of storage, such as journal; never its address.")
    wall_seconds: NotNegative
    stages: tuple[Stage, ...] = Field(
        description="In order; empty in tables from before they were kept."
    )


class AlphaTable(Frozen):
    """One forgetting factor per layer and key-value head, with where it came from and its proof.

    Instances are whole and valid: build them with `seal`, which fills in the digest, or with
    `load_table`, which checks it.
    """

    schema_version: Literal[2]
    name: Name
    model: ModelIdentity
    policy: TablePolicy
    calibration: Calibration
    evidence: Evidence
    search: Search
    created_at: AwareDatetime
    tool_version: str
    sha256: Digest = Field(description="SHA-256 over the canonical JSON of all other fields.")

    @model_validator(mode="after")
    def _shape(self) -> Self:
        try:
            self.created_at.astimezone(UTC)
        except OverflowError:
            raise ValueError("created_at is outside the years 1 to 9999 of UTC") from None
        layers, heads = self.model.num_layers, self.model.num_kv_heads
        if len(self.policy.alpha) != layers:
            raise ValueError(f"policy.alpha has {len(self.policy.alpha)} layers, model {layers}")
        for layer, row in enumerate(self.policy.alpha):
            if len(row) != heads:
                raise ValueError(f"policy.alpha[{layer}] has {len(row)} heads, model {heads}")
        if len(self.policy.layer_share) != layers:
            raise ValueError(
                f"policy.layer_share has {len(self.policy.layer_share)} layers, model {layers}"
            )
        return self

    def check_model(self, identity: ModelIdentity) -> None:
        """Raise TableMismatch unless the table was made for the model of `identity`."""
        difference = self.model.difference(identity)
        if difference is not None:
            raise TableMismatch(
                f"table {self.name!r} was made for model {self.model.id!r} and does not fit "
                f"{identity.id!r}: {difference}; fit one with python -m tuner for this model"
            )


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the newest version of the file."""
    schema = AlphaTable.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def canonical_json(document: Mapping[str, Any]) -> str:
    """Write `document` in the form that digests are taken of: sorted keys, no spaces, no NaN."""
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def canonical_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the canonical JSON, as UTF-8, of `document` without its `sha256`."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def seal(**fields: Any) -> AlphaTable:
    """Build a table of the newest version from its fields, filling in version and digest.

    Raises TableInvalid where a field is missing, unknown or out of range.
    """
    try:
        draft = AlphaTable(schema_version=SCHEMA_VERSION, sha256="0" * 64, **fields)
    except ValidationError as error:
        raise TableInvalid(f"alpha table: {first_problem(error)}") from error
    return draft.model_copy(update={"sha256": canonical_digest(draft.model_dump(mode="json"))})


def save_table(table: AlphaTable, path: Path) -> None:
    """Write `table` to `path` so that a reader sees the old file or the new one, never a part."""
    document = table.model_dump(mode="json")
    assert canonical_digest(document) == table.sha256, "tables are built with seal()"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the owner alone; a table is read by servers run as others.
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
    """Version 1 had equal slots in every layer, and kept neither stages nor p-values."""
    policy = document.get("policy")
    alpha = policy.get("alpha") if isinstance(policy, dict) else None
    layers = len(alpha) if isinstance(alpha, list) else 0
    brought: dict[str, dict[str, Any]] = {
        "policy": {"layer_share": [1.0] * layers},
        "evidence": {"p_holm": {}, "uniform": None},
        "search": {"stages": []},
    }
    # What is no object is left for the fields' own checks to name.
    parts = {name: document.get(name) for name in brought}
    return document | {
        name: {**part, **brought[name]} for name, part in parts.items() if isinstance(part, dict)
    }


UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
"""From version n to n + 1: the step takes a document of version n and returns one of n + 1.

`schema_version` and `sha256` are not a step's concern; `upgrade` sets them.
"""


def upgrade(
    document: dict[str, Any],
    steps: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = UPGRADES,
    current: int = SCHEMA_VERSION,
) -> dict[str, Any]:
    """Bring `document` to version `current` one step at a time, and give it its new digest.

    Raises TableTooNew for a version above `current`, TableInvalid for one that is no positive
    integer or that no step leads on from.
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
            raise TableInvalid(f"schema_version {version} can no longer be read; fit it again")
        document = {**steps[version](document), "schema_version": version + 1}
        version += 1
        document["sha256"] = canonical_digest(document)
    return document


def parse_table(data: bytes) -> AlphaTable:
    """Read a table from the bytes of its file: digest, then version, then every field.

    Raises TableCorrupt, TableTooNew or TableInvalid, with what is wrong.
    """
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TableCorrupt(f"not whole JSON, perhaps cut short: {first_line(error)}") from error
    if not isinstance(document, dict):
        raise TableCorrupt("not a JSON object")
    # A newer version may define its digest anew, so the version is looked at first.
    version = document.get("schema_version")
    if not (isinstance(version, int) and version > SCHEMA_VERSION):
        try:
            digest = canonical_digest(document)
        except (ValueError, RecursionError) as error:
            # What Python reads goes further than JSON: 1e999, half of a surrogate pair.
            raise TableCorrupt(f"holds what canonical JSON cannot: {first_line(error)}") from error
        if document.get("sha256") != digest:
            raise TableCorrupt(
                f"sha256 is {document.get('sha256')!r} in the file and {digest!r} of its content; "
                "the file was changed or damaged after it was written"
            )
    try:
        # Strict validation takes JSON's arrays for tuples and its strings for times only when it
        # reads JSON itself.
        return AlphaTable.model_validate_json(json.dumps(upgrade(document)))
    except ValidationError as error:
        raise TableInvalid(first_problem(error)) from error


def load_table(path: Path, identity: ModelIdentity | None = None) -> AlphaTable:
    """Read and check the table at `path`, against the model of `identity` where one is given.

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


def first_problem(error: ValidationError) -> str:
    """Put pydantic's report into one line: where, what, and the value it was given."""
    problems = error.errors(include_url=False)
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    value = "" if isinstance(first["input"], (dict, list)) else f" (got {first['input']!r})"
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{where + ': ' if where else ''}{message}{value}{more}"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
