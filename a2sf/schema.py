"""The alpha table: the content of the versioned file that the tuner writes and the service loads.

Owns the fields and their ranges, and the types of numbers that other models share. Knows nothing of
how the file is written (`a2sf.tablefile`), of tensors, or of how a table is found. The JSON Schema
under `proto/` is exported from here (`json_schema`); a test keeps the two equal.
"""

from datetime import UTC
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from a2sf.errors import TableMismatch

SCHEMA_VERSION: Final = 3

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A table's name: safe as a file name, so it cannot point outside the tables' directory."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Alpha = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=0, lt=2**32)]
"""A number of tokens that fits into a message."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Frozen(BaseModel):
    """Base of the values that modules exchange: immutable, strictly typed, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelIdentity(Frozen):
    """The model that a table belongs to. Two models with the same identity may share tables."""

    id: str = Field(description="The model's name or hub id, for people; not compared on load.")
    revision: str | None = Field(
        description="The hub revision; null for a model that is not from a hub."
    )
    architecture: str = Field(description="The transformers class, such as LlamaForCausalLM.")
    num_layers: Positive
    num_attention_heads: Positive = Field(description="Query heads of one layer.")
    num_kv_heads: Positive = Field(description="Key-value heads of one layer.")
    fingerprint: Digest = Field(
        description="SHA-256 over the canonical sizes and rope settings and the first 4 KiB of "
        "every stored k_proj weight (or qkv_proj weight, in models that fuse them)."
    )

    @property
    def fingerprints(self) -> frozenset[str]:
        """All fingerprints by which the model is known."""
        return frozenset({self.fingerprint})

    @property
    def hashed(self) -> str:
        """The settings that are hashed with the weights, to end a sentence; empty if unknown."""
        return ""

    def difference(self, other: "ModelIdentity") -> str | None:
        """Say how `other` differs in what a table depends on; None if it does not differ."""
        for field in ("architecture", "num_layers", "num_attention_heads", "num_kv_heads"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"{field} is {mine!r} in the table and {theirs!r} in the model"
        if self.fingerprint in other.fingerprints:
            return None
        if self.id == other.id and self.revision != other.revision:
            mine, theirs = self.revision, other.revision
            known = f"revision is {mine!r} in the table and {theirs!r} in the model"
        else:
            known = "the weights differ, or the sizes or rope settings that are hashed with them"
        return (
            f"{known}: fingerprint {self.fingerprint[:12]}... in the table and "
            f"{other.fingerprint[:12]}... in the model{other.hashed}"
        )


class LoadedIdentity(ModelIdentity):
    """The identity of a loaded model. It has more than a table stores."""

    earlier: tuple[Digest, ...] = Field(default=(), exclude=True)
    """Fingerprints of the same model in older tables."""
    settings: str = Field(default="", exclude=True)
    """The settings that are hashed with the weights, for people."""

    @property
    def fingerprints(self) -> frozenset[str]:
        """All fingerprints by which the model is known."""
        return frozenset({self.fingerprint, *self.earlier})

    @property
    def hashed(self) -> str:
        """The settings that are hashed with the weights, to end a sentence."""
        return f" (whose settings are {self.settings})"


def _stored(model: ModelIdentity) -> ModelIdentity:
    return ModelIdentity(**model.model_dump())


StoredIdentity = Annotated[ModelIdentity, AfterValidator(_stored)]
"""The part of an identity that a file stores."""


class TablePolicy(Frozen):
    """The policy that the table was fitted with; serving must use the same one."""

    alpha: tuple[tuple[Alpha, ...], ...] = Field(
        min_length=1, description="num_layers lists of num_kv_heads forgetting factors."
    )
    head_share: tuple[tuple[Weight, ...], ...] = Field(
        min_length=1,
        description="num_layers lists of num_kv_heads weights. The slots of all heads are split in "
        "proportion to them: with equal weights every head gets the budget, otherwise some heads "
        "get more and others less. Fitted weights have mean 1.",
    )
    budget: Annotated[Tokens, Field(ge=1)] | None = Field(
        default=None, description="Slots per head, the mean over all heads."
    )
    budget_ratio: Ratio | None = Field(
        default=None, description="The budget as a share of prompt + max_new tokens."
    )
    min_budget: Tokens | None = Field(
        default=None,
        description="Lower limit of the budget that budget_ratio gives, in slots; a shorter "
        "sequence keeps all its tokens. 0: no limit; null: the limit of the server. It does not "
        "apply to `budget`.",
    )
    recent: Tokens | None = Field(
        default=None, description="Number of tokens before the newest that are never evicted."
    )
    recent_share: Share | None = Field(
        default=None,
        description="The recent window as a share of the head's slots - sinks - 1, rounded down.",
    )
    sinks: Tokens = Field(description="Number of first tokens that are never evicted.")
    prefill_chunk: Tokens = Field(
        description="Tokens of a block of the prompt; 0: the whole prompt is one block."
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.budget is None) == (self.budget_ratio is None):
            raise ValueError("give exactly one of budget and budget_ratio")
        if (self.recent is None) == (self.recent_share is None):
            raise ValueError("give exactly one of recent and recent_share")
        return self


class Calibration(Frozen):
    """The data that the table was fitted on."""

    dataset: str
    split: str
    examples: Positive
    tokens: Positive
    data_sha256: Digest = Field(description="SHA-256 over the token ids of the examples.")
    seed: int


class Estimate(Frozen):
    """A mean over examples and its bootstrap interval."""

    mean: Finite
    low: Finite
    high: Finite


class UniformSetting(Frozen):
    """One alpha for all layers and heads, equal slots, a recent window, and sinks."""

    alpha: Alpha
    recent_share: Share
    sinks: Count


class Evidence(Frozen):
    """The costs of the table and its baselines on examples that the search did not use."""

    objective: str = Field(description="The quantity that the costs measure, with its unit.")
    dataset: str
    split: str
    examples: Positive
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        description="Coverage of an interval."
    )
    table: Estimate = Field(description="The cost of the fitted per-head table.")
    baselines: dict[str, Estimate] = Field(description="The cost of each baseline, by name.")
    paired: dict[str, Estimate] = Field(
        description="Cost of the fitted table minus that of the baseline, on the same examples; "
        "below 0 the table is better."
    )
    p_holm: dict[str, Share] = Field(
        description="p-value of each paired difference (sign flips, two-sided), with Holm's "
        "correction over all of them; empty in tables of older versions."
    )
    lost_nll: Estimate | None = Field(
        description="Increase of the next token's negative log-likelihood under the fitted table "
        "over the full cache, on the same examples, in nats per token; null in tables of older "
        "versions.",
    )
    uniform: UniformSetting | None = Field(
        description="The best uniform setting, which is the baseline `uniform`; null in tables of "
        "older versions."
    )
    verdict: Literal["better", "no_better_than_uniform"] = Field(
        description="better: the paired interval against the best uniform setting lies below 0, "
        "and its corrected p-value is below 1 - confidence. Otherwise the file contains the "
        "uniform setting, unless the user asked for the table with --keep-table."
    )


class Stage(Frozen):
    """One stage of a search: its work, and the cost of its best candidate."""

    name: str
    trials: Count = Field(
        description="Number of measured candidates, including those that were stopped early."
    )
    evaluations: NotNegative = Field(
        description="The trials in passes over all calibration examples through all layers."
    )
    seconds: NotNegative = Field(description="Time of the measurements, summed over workers.")
    calibration: Finite = Field(
        description="Lowest cost on the calibration examples so far; for `per layer`, of the stage."
    )
    held_out: Estimate = Field(description="Cost of that candidate on the held-out examples.")
    paired: Estimate = Field(description="That cost minus the best uniform setting's, paired.")


class Search(Frozen):
    """How the table was found."""

    sampler: str
    trials: Count = Field(
        description="Candidates of all stages, including `uniform` and the baseline `per layer`."
    )
    study: str
    storage: str = Field(description="Kind of storage, such as journal; never its address.")
    wall_seconds: NotNegative
    stages: tuple[Stage, ...] = Field(
        description="In order, with the search for the baseline `per layer`; empty in tables of "
        "older versions."
    )


class AlphaTable(Frozen):
    """A forgetting factor and a share of the slots for each layer and KV head, with their proof.

    Build instances with `seal`, which computes the digest, or with `load_table`, which checks it.
    """

    schema_version: Literal[3]
    name: Name
    model: StoredIdentity
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
        for name in ("alpha", "head_share"):
            rows = getattr(self.policy, name)
            if len(rows) != layers:
                raise ValueError(f"policy.{name} has {len(rows)} layers, model {layers}")
            for layer, row in enumerate(rows):
                if len(row) != heads:
                    raise ValueError(f"policy.{name}[{layer}] has {len(row)} heads, model {heads}")
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
