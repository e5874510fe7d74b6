"""Cache policies: what may be evicted from a sequence's cache.

Owns `CachePolicy` (the fields that a request, a table or the server may set), the presets, and
`EffectivePolicy` (the plain numbers that the engine uses). Knows nothing of how the fields become
numbers (`a2sf.cache.budgets`), of tensors, or of transport.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from a2sf.schema import Alpha, AlphaTable, Count, Frozen, Positive, Ratio, Share
from a2sf.validation import Given

Heads = tuple[tuple[int, ...], ...]
"""One number per head, [num_layers][num_kv_heads]."""

DEFAULT_SINKS = 4
DEFAULT_PREFILL_CHUNK = 0

Preset = Literal["full", "window", "h2o", "tova_per_head", "random"]
"""Known methods as settings of the block law.

    preset         alpha  recent                       source
    full           1      0                            budget = prompt + max_new: nothing is evicted
    window         1      budget - sinks - 1           StreamingLLM, arXiv 2309.17453
    h2o            1      floor((budget - sinks) / 2)  H2O, arXiv 2306.14048
    tova_per_head  0      0, or as given               TOVA, arXiv 2401.06104, without its head mean
    random         -      0, or as given               baseline: the score is a hash, never updated

The method of the A2SF paper (arXiv 2407.20485) is a uniform `alpha`; ours is a table.
"""

PRESETS: tuple[Preset, ...] = ("full", "window", "h2o", "tova_per_head", "random")
OWN_RECENT: tuple[Preset, ...] = ("full", "window", "h2o")
"""Presets that set their own recent window; full also sets its own budget."""


class CachePolicy(Given):
    """The cache policy of a request. Omitted fields come from the table, then from the server.

    Set at most one of `preset`, `table` and `alpha`; of `budget` and `budget_ratio`; of `recent`
    and `recent_share`. A ratio is a share of prompt + max_new tokens; `recent_share` is a share of
    budget - sinks - 1. `min_budget` is the lower limit of a budget from a ratio, but never more
    than prompt + max_new tokens; 0: no limit. It does not apply to `budget`.
    """

    preset: Preset | None = None
    table: str | None = None
    alpha: Alpha | None = None
    budget: Positive | None = None
    budget_ratio: Ratio | None = None
    min_budget: Count | None = None
    recent: Count | None = None
    recent_share: Share | None = None
    sinks: Count | None = None
    prefill_chunk: Count | None = None
    random_seed: Count | None = Field(default=None, lt=2**31)

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        for names in (
            ("preset", "table", "alpha"),
            ("budget", "budget_ratio"),
            ("recent", "recent_share"),
        ):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise ValueError(f"give at most one of {', '.join(names)}; got {', '.join(given)}")
        if self.preset in OWN_RECENT:
            for name in ("recent", "recent_share"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"preset {self.preset} sets its own recent window; omit {name}"
                    )
        if self.preset == "full":
            for name in ("budget", "budget_ratio"):
                if getattr(self, name) is not None:
                    raise ValueError(f"preset full keeps every token; omit {name}")
        if self.random_seed is not None and self.preset != "random":
            raise ValueError("random_seed is only for preset random; omit it, or set that preset")
        return self

    @property
    def names_method(self) -> bool:
        """Whether this policy names a method: a preset, a table or a uniform alpha."""
        return self.preset is not None or self.table is not None or self.alpha is not None


DEFAULT_METHOD = CachePolicy(alpha=0.98, recent_share=0.5)
"""The server's method if neither the request nor a table names one. This uniform setting cost no
more than h2o on any of four datasets, and less on two; see benchmarks/FINDINGS.md, "What a server
does by default"."""


def policy_if_omitted(server: CachePolicy, table: AlphaTable | None) -> CachePolicy:
    """Return the policy of a request without one; `table` is the default table, or None."""
    if table is None:
        return server
    own = table.policy.model_dump(exclude={"alpha", "head_share"})
    if own["min_budget"] is None:
        own["min_budget"] = server.min_budget
    return CachePolicy(table=table.name, **own)


class EffectivePolicy(Frozen):
    """The policy of one sequence in plain numbers: the input of the block law."""

    method: Annotated[str, Field(description="A preset's name, a2sf, or table.")]
    alpha: tuple[tuple[Alpha, ...], ...] = Field(description="[num_layers][num_kv_heads]")
    budget: Positive = Field(
        description="Slots per head, the mean of head_budgets: the requested budget, or more if "
        "`min_budget` raised it."
    )
    head_budgets: tuple[tuple[Positive, ...], ...] = Field(
        description="Slots of each head, [num_layers][num_kv_heads]."
    )
    min_budget: Positive | None = Field(
        default=None,
        description="Set if a ratio gave fewer slots than this limit. Then `budget` is the limit, "
        "or the length of the sequence if that is less.",
    )
    recent: Count = Field(description="Recent window of a head of `budget` slots, in tokens.")
    head_recents: tuple[tuple[Count, ...], ...] = Field(
        description="Recent window of each head, [num_layers][num_kv_heads] tokens."
    )
    sinks: Count
    prefill_chunk: Count
    table_name: str | None = None
    table_sha256: str | None = None
    random_seed: Count | None = Field(
        default=None, description="Only for method random: the seed of the scores."
    )
    pooled_floor: Share | None = Field(
        default=None,
        description="Teacher forcing only. If set, the scores at the end of the prompt split the "
        "slots of a layer again, and each head keeps at least this share of its budget.",
    )

    @property
    def scored(self) -> bool:
        """Whether attention decides what is evicted. The other methods use position or a hash."""
        return self.method not in ("full", "window", "random")

    def staging_slots(self, prompt_tokens: int) -> int:
        """Slots per head that a prompt of this length needs during prefill."""
        if self.prefill_chunk == 0:
            return prompt_tokens
        return min(prompt_tokens, max(map(max, self.head_budgets)) - 1 + self.prefill_chunk)
