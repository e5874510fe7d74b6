"""The alpha table: what the versioned file says that the tuner writes and the service loads.

Owns the fields and their ranges. Knows nothing of how the file is written (`a2sf.tablefile`), of
tensors, of how a table is found, or of who asks for it. The JSON Schema under `proto/` is exported
from here (`json_schema`) and a test holds the two equal.
"""

from datetime import UTC
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from a2sf.errors import TableMismatch

SCHEMA_VERSION: Final = 3

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

    @property
    def fingerprints(self) -> frozenset[str]:
        """All fingerprints by which the model is known."""
        return frozenset({self.fingerprint})

    @property
    def hashed(self) -> str:
        """What is hashed beside the weights, as the end of a sentence; empty if nobody knows."""
        return ""

    def difference(self, other: "ModelIdentity") -> str | None:
        """Say how `other` differs in what a table depends on, or None where it does not."""
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
    """The identity of a model that is at hand, which says more than a table keeps of it."""

    earlier: tuple[Digest, ...] = Field(default=(), exclude=True)
    """Fingerprints that older tables have of the same model."""
    settings: str = Field(default="", exclude=True)
    """What is hashed beside the weights, for people."""

    @property
    def fingerprints(self) -> frozenset[str]:
        """All fingerprints by which the model is known."""
        return frozenset({self.fingerprint, *self.earlier})

    @property
    def hashed(self) -> str:
        """What is hashed beside the weights, as the end of a sentence."""
        return f" (whose settings are {self.settings})"


def _stored(model: ModelIdentity) -> ModelIdentity:
    return ModelIdentity(**model.model_dump())


StoredIdentity = Annotated[ModelIdentity, AfterValidator(_stored)]
"""What a file keeps of an identity."""


class TablePolicy(Frozen):
    """What serving must do so that the table means what it meant when it was fitted."""

    alpha: tuple[tuple[Alpha, ...], ...] = Field(
        min_length=1, description="num_layers lists of num_kv_heads forgetting factors."
    )
    head_share: tuple[tuple[Weight, ...], ...] = Field(
        min_length=1,
        description="num_layers lists of num_kv_heads weights by which the slots of all heads are "
        "dealt among them: equal weights give every head the budget, others give more to some at "
        "the cost of the rest. Only their proportions matter; fitted weights have mean 1.",
    )
    budget: Annotated[Tokens, Field(ge=1)] | None = Field(
        default=None, description="Slots of a head in tokens, the mean over all heads."
    )
    budget_ratio: Ratio | None = Field(
        default=None, description="The same as a share of prompt + max_new tokens."
    )
    min_budget: Tokens | None = Field(
        default=None,
        description="The fewest slots that a budget_ratio comes to when it is served, in tokens; a "
        "shorter sequence keeps all of its tokens. 0: no floor; null: the server's own. A budget "
        "in tokens is exact as given.",
    )
    recent: Tokens | None = Field(
        default=None, description="Tokens before the newest that are never evicted."
    )
    recent_share: Share | None = Field(
        default=None, description="The same as a share of a head's slots - sinks - 1, floored."
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
    lost_nll: Estimate | None = Field(
        description="By how many nats a token the true next token costs more under the fitted "
        "table than with the full cache, on the same examples; null in tables from before it was "
        "kept.",
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
    """A forgetting factor and a share of the slots for each layer and KV head, with their proof.

    Instances are whole and valid: build them with `seal`, which fills in the digest, or with
    `load_table`, which checks it.
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
