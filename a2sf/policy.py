"""Cache policies: from optional fields to the numbers that the engine uses.

Owns `CachePolicy` (the fields that a request, a table or the server may set), the presets, the
split of slots among heads, and `resolve`, which combines the three into one `EffectivePolicy` of
plain integers. After `resolve` no budget is a ratio and no window a share. Knows nothing of tensors
or of transport.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain, islice, pairwise
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator

from a2sf.errors import InvalidArgument
from a2sf.schema import Alpha, AlphaTable, Count, Frozen, Given, Positive, Ratio, Share, TablePolicy

T = TypeVar("T")

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
_OWN_RECENT = ("full", "window", "h2o")


class CachePolicy(Given):
    """The cache policy of a request. Fields left out come from the table, then the server.

    At most one of `preset`, `table` and `alpha`; of `budget` and `budget_ratio`; of `recent` and
    `recent_share`. A ratio is of prompt + max_new tokens, a share of budget - sinks - 1. A budget
    that comes from a ratio is never below `min_budget` slots, nor above what the request needs; 0
    is no floor. A `budget` is exact as given.
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
        if self.preset in _OWN_RECENT and (
            self.recent is not None or self.recent_share is not None
        ):
            raise ValueError(f"preset {self.preset} sets its own recent window; leave recent out")
        if self.preset == "full" and (self.budget is not None or self.budget_ratio is not None):
            raise ValueError("preset full keeps every token; leave budget and budget_ratio out")
        if self.random_seed is not None and self.preset != "random":
            raise ValueError("random_seed is for preset random only")
        return self

    @property
    def names_method(self) -> bool:
        """Whether this policy says how to score: by preset, table or uniform alpha."""
        return self.preset is not None or self.table is not None or self.alpha is not None


DEFAULT_METHOD = CachePolicy(alpha=0.98, recent_share=0.5)
"""The server's method when neither request nor table names one. This uniform setting cost no more
than h2o on any of four datasets, and less on two; see benchmarks/FINDINGS.md, "What a server does
by default"."""


def policy_if_omitted(server: CachePolicy, table: AlphaTable | None) -> CachePolicy:
    """Return the policy of a request that gives none, where `table` (None: none) is the default."""
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
        description="The mean of head_budgets, slots: what was asked for, where `min_budget` did "
        "not raise it."
    )
    head_budgets: tuple[tuple[Positive, ...], ...] = Field(
        description="[num_layers][num_kv_heads] slots."
    )
    min_budget: Positive | None = Field(
        default=None,
        description="Set where a ratio came to fewer slots than this floor: `budget` is the floor, "
        "or the sequence's length where that is less.",
    )
    recent: Count = Field(description="What a head of `budget` slots would protect, tokens.")
    head_recents: tuple[tuple[Count, ...], ...] = Field(
        description="[num_layers][num_kv_heads] tokens."
    )
    sinks: Count
    prefill_chunk: Count
    table_name: str | None = None
    table_sha256: str | None = None
    random_seed: Count | None = Field(
        default=None, description="Set for method random only: scores are a hash of it."
    )
    pooled_floor: Share | None = Field(
        default=None,
        description="Teacher forcing only. If set, the scores at the end of the prompt split the "
        "slots of a layer again, and each head keeps at least this share of its budget.",
    )
    local_heads: tuple[Count, Positive] | None = Field(
        default=None,
        description="(first, end): this process has the KV heads first to end - 1 of each layer; "
        "None: all heads.",
    )

    @property
    def first_head(self) -> int:
        """The first KV head of this process."""
        return 0 if self.local_heads is None else self.local_heads[0]

    @property
    def local_alpha(self) -> tuple[tuple[float, ...], ...]:
        """`alpha` of the heads of this process: [num_layers][heads]."""
        return select_heads(self.alpha, self.local_heads)

    @property
    def local_budgets(self) -> tuple[tuple[int, ...], ...]:
        """`head_budgets` of the heads of this process: [num_layers][heads] slots."""
        return select_heads(self.head_budgets, self.local_heads)

    @property
    def local_recents(self) -> tuple[tuple[int, ...], ...]:
        """`head_recents` of the heads of this process: [num_layers][heads] tokens."""
        return select_heads(self.head_recents, self.local_heads)

    @property
    def scored(self) -> bool:
        """Whether attention decides what is evicted. The other methods use position or a hash."""
        return self.method not in ("full", "window", "random")

    def staging_slots(self, prompt_tokens: int) -> int:
        """Slots per head that a prompt of this length needs during prefill."""
        if self.prefill_chunk == 0:
            return prompt_tokens
        return min(prompt_tokens, max(map(max, self.local_budgets)) - 1 + self.prefill_chunk)


def select_heads(
    rows: Sequence[tuple[T, ...]], heads: tuple[int, int] | None
) -> tuple[tuple[T, ...], ...]:
    """Return the heads heads[0] to heads[1] - 1 of each layer's row [num_kv_heads]; None: all."""
    return tuple(rows) if heads is None else tuple(row[slice(*heads)] for row in rows)


def split_slots(
    budget: int, shares: Sequence[Sequence[float]], most: int, least: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Split layers x heads x `budget` slots among all heads in proportion to their shares.

    No head gets more than `most`. If the budget is at least `least`, no head gets less than that.
    The other heads split the rest in proportion to their shares. If `budget` is `most` or more,
    every head gets `budget`. The running total over layers and heads is rounded (halves up), so
    that the sum is exact and equal shares get equal slots.

    Args:
        budget: slots per head, averaged over all heads.
        shares: [layers][heads] positive weights; only their proportions matter.
        most: the most slots that a head can use, such as the sequence's length.
        least: the fewest slots that a head needs to hold what is protected.

    Returns:
        [layers][heads] slots; their sum is `layers * heads * budget`. A head with a very small
        share may get 0.
    """
    if budget >= most:
        return tuple((budget,) * len(layer) for layer in shares)
    least = min(least, budget)
    # Whole numbers throughout: in floats a rounded total could give a head more than `most`.
    ratios = [share.as_integer_ratio() for layer in shares for share in layer]
    unit = max(denominator for _, denominator in ratios)
    weights = [numerator * (unit // denominator) for numerator, denominator in ratios]
    slots, weight = budget * len(weights), sum(weights)
    settled: dict[int, int] = {}
    while True:
        open_heads = [head for head in range(len(weights)) if head not in settled]
        over = {h: x for h in open_heads if (x := weights[h] * slots - most * weight) >= 0}
        under = {h: x for h in open_heads if (x := least * weight - weights[h] * slots) > 0}
        if not over and not under:
            break
        # Settle the side with the larger total first: the slots that it frees or takes move the
        # heads of the other side towards the allowed range.
        full = sum(over.values()) >= sum(under.values())
        for head in over if full else under:
            settled[head] = most if full else least
            slots, weight = slots - settled[head], weight - weights[head]
    fixed, open_weight, total = 0, 0, [0]
    for head, share in enumerate(weights):
        if head in settled:
            fixed += settled[head]
        else:
            open_weight += share
        by_share = (2 * slots * open_weight + weight) // (2 * weight) if weight else 0
        total.append(fixed + by_share)
    heads = (end - begin for begin, end in pairwise(total))
    return tuple(tuple(islice(heads, len(layer))) for layer in shares)


def slots_for(budget: int, shares: Sequence[Sequence[float]]) -> int:
    """Return the mean slots per head that give every head at least `budget` slots."""
    weights = [Fraction(share) for layer in shares for share in layer]
    return math.ceil(budget * sum(weights, Fraction()) / (len(weights) * min(weights)))


def resolve(
    request: CachePolicy,
    *,
    table: AlphaTable | TablePolicy | None,
    server: CachePolicy,
    length: int,
    slots: Sequence[Sequence[int]] | int,
    num_layers: int,
    num_kv_heads: int,
) -> EffectivePolicy:
    """Resolve a policy to plain numbers: the request's fields, else the table's, else the server's.

    Args:
        request: the fields that the request sets.
        table: the table that the request (or else the server) names, already looked up; or the
            policy alone of a table that is still being fitted and has no name.
        server: the server's own policy.
        length: prompt + max_new, in tokens.
        slots: [num_layers][num_kv_heads] slots of a row of the slab; one number if all are equal.
        num_layers: layers of the model.
        num_kv_heads: KV heads of a layer.

    Raises InvalidArgument with the field, its value and the accepted values. Nothing is clamped,
    with one exception: a ratio never gives fewer slots than `min_budget`, and the result then says
    so.

    The recent window of a preset is its own, or that of the policy that names the preset, or the
    request's. The server's window belongs to the server's method, so a preset that the request
    names does not take it.
    """
    method = request if request.names_method else server
    preset = method.preset
    if (table is None) != (preset is not None or method.alpha is not None):
        raise AssertionError("the caller looks up the table that the policy names")
    fitted = table.policy if isinstance(table, AlphaTable) else table

    sources = (request, fitted, server) if fitted else (request, server)
    # Nothing is evicted from a full cache, so there is nothing to protect.
    sinks = _first((s.sinks for s in sources), 0 if preset == "full" else DEFAULT_SINKS)
    prefill_chunk = _first((s.prefill_chunk for s in sources), DEFAULT_PREFILL_CHUNK)
    whole = (length, None, True)
    budget, floor, stated = whole if preset == "full" else _budget(sources, length)
    protecting = (request,) if request.preset is not None else sources
    equal = ((1.0,) * num_kv_heads,) * num_layers
    # In a short sequence a head with a small share still needs room for the newest token, the sinks
    # and the recent window.
    least = sinks + 1 + _recent(protecting, 0)
    budgets = split_slots(budget, fitted.head_share if fitted else equal, length, least)

    def recent(slots: int) -> int:
        if preset == "window":
            return max(slots - sinks - 1, 0)
        if preset == "h2o":
            return max((slots - sinks) // 2, 0)
        return 0 if preset == "full" else _recent(protecting, slots - sinks - 1)

    recents = tuple(tuple(recent(mine) for mine in layer) for layer in budgets)
    _check_slab(budgets, slots, budget, floor, length, preset)
    # A ratio may give the whole sequence. Then nothing is evicted, and there is nothing to check.
    if budget < length or stated:
        _check_room(budget, recent(budget), sinks)
    if fitted is not None:
        alpha = fitted.alpha
    else:
        # `random` accumulates no attention; alpha 1 keeps its scores as they were set.
        uniform = {"tova_per_head": 0.0}.get(preset, 1.0) if preset else method.alpha
        assert uniform is not None
        alpha = ((uniform,) * num_kv_heads,) * num_layers
    sealed = table if isinstance(table, AlphaTable) else None
    return EffectivePolicy(
        method=preset or ("table" if table else "a2sf"),
        alpha=alpha,
        budget=budget,
        head_budgets=budgets,
        min_budget=floor,
        recent=recent(budget),
        head_recents=recents,
        sinks=sinks,
        prefill_chunk=prefill_chunk,
        table_name=sealed.name if sealed else None,
        table_sha256=sealed.sha256 if sealed else None,
        random_seed=(method.random_seed or 0) if preset == "random" else None,
    )


def _check_slab(
    budgets: Heads,
    slots: Sequence[Sequence[int]] | int,
    budget: int,
    floor: int | None,
    length: int,
    preset: Preset | None,
) -> None:
    """Refuse a policy if any head needs more slots than a row has for that head."""
    there = tuple((slots,) * len(layer) for layer in budgets) if isinstance(slots, int) else slots
    flat, equal = len(set(chain(*there))) == 1, len(set(chain(*budgets))) == 1
    heads = [(layer, head) for layer, row in enumerate(budgets) for head in range(len(row))]
    layer, head = max(heads, key=lambda at: budgets[at[0]][at[1]] - there[at[0]][at[1]])
    needs, has = budgets[layer][head], there[layer][head]
    if needs <= has:
        return
    if preset == "full":
        asked = f"prompt + max_new is {length} tokens and preset full keeps them all"
    elif equal:
        asked = f"budget is {budget} tokens" + ("" if flat else " in every head")
    else:
        asked = (
            f"budget is {budget} tokens a head on average, of which head_share gives layer {layer} "
            f"head {head} {needs} slots"
        )
    if floor is not None:
        asked = f"min_budget {floor} raises what budget_ratio comes to: {asked}"
    if flat:
        room = f"accepted: at most {has} slots" + ("" if equal else " in every head")
    else:
        room = f"layer {layer} head {head} has {has} slots (rows follow head_share)"
    field = "budget" if floor is None else "min_budget"
    raise InvalidArgument(
        f"cache_policy.{field}", f"{asked}; {room}; lower {field} or raise --slots"
    )


def _check_room(budget: int, recent: int, sinks: int) -> None:
    """Refuse a policy that protects so much that nothing can be evicted where something must be.

    Asked of a head of `budget` slots: no head gets fewer than it needs where that one has them.
    """
    if budget < sinks + recent + 1:
        raise InvalidArgument(
            "cache_policy.budget",
            f"budget is {budget} tokens, and sinks {sinks} + recent {recent} + 1 for the newest "
            f"need {sinks + recent + 1}; raise budget, or lower sinks or recent",
        )


def _first(values: Iterable[int | None], default: int) -> int:
    return next((value for value in values if value is not None), default)


def _budget(
    sources: Sequence[CachePolicy | TablePolicy], length: int
) -> tuple[int, int | None, bool]:
    """Return the slots, the floor where one raised them, and whether they were stated as slots."""
    floor = _first((source.min_budget for source in sources), 0)
    for source in sources:
        if source.budget is not None:
            return source.budget, None, True
        if source.budget_ratio is not None:
            budget, least = math.floor(source.budget_ratio * length + 0.5), min(floor, length)
            if budget < least:
                return least, floor, False
            if budget < 1:
                raise InvalidArgument(
                    "cache_policy.budget_ratio",
                    f"{source.budget_ratio} of {length} tokens is less than one slot",
                )
            return budget, None, False
    raise InvalidArgument("cache_policy.budget", "no budget given; accepted: 1 or more tokens")


def _recent(sources: Iterable[CachePolicy | TablePolicy], room: int) -> int:
    for source in sources:
        if source.recent is not None:
            return source.recent
        if source.recent_share is not None:
            return math.floor(source.recent_share * max(room, 0))
    return 0
