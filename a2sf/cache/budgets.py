"""From a policy's optional fields to plain numbers: the budget, window and alpha of every head.

Owns `resolve`, which combines the fields of the request, its table and the server, and the numbers
of the presets. In its result no budget is a ratio and no window a share. `a2sf.cache.slot_shares`
splits slots among heads. Knows nothing of tensors or of transport.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from a2sf.cache.slot_shares import split_slots
from a2sf.errors import InvalidArgument
from a2sf.policy import (
    DEFAULT_PREFILL_CHUNK,
    DEFAULT_SINKS,
    CachePolicy,
    EffectivePolicy,
    Heads,
)
from a2sf.schema import AlphaTable, TablePolicy


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
        table: the table that the request names, or else the server; or the policy of a table that
            is still being fitted and has no name.
        server: the server's policy.
        length: prompt + max_new, in tokens.
        slots: [num_layers][num_kv_heads] slots of a row of the slab; one number if all are equal.
        num_layers: layers of the model.
        num_kv_heads: KV heads of a layer.

    Raises InvalidArgument with a field of the request, the value and the accepted values. Nothing
    is clamped, with one exception: `min_budget` raises a ratio, and the result says so.

    A preset without its own recent window takes it from the policy that names the preset, or from
    the request. The server's window belongs to the server's method, so a preset of the request does
    not take it.
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
    chosen = _whole(length) if preset == "full" else _choose_budget(sources, length)
    budget = chosen.slots
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
    _check_slab(request, chosen, budgets, slots)
    # A ratio may give the whole sequence. Then nothing is evicted, and there is nothing to check.
    if budget < length or chosen.field in ("budget", "preset"):
        _check_room(request, chosen, recent(budget), sinks)
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
        min_budget=chosen.floor,
        recent=recent(budget),
        head_recents=recents,
        sinks=sinks,
        prefill_chunk=prefill_chunk,
        table_name=sealed.name if sealed else None,
        table_sha256=sealed.sha256 if sealed else None,
        random_seed=(method.random_seed or 0) if preset == "random" else None,
    )


@dataclass(frozen=True)
class _Budget:
    """The slots per head, and where the number comes from."""

    slots: int
    field: str
    """The field that gave the number: budget, budget_ratio, min_budget or preset."""
    reason: str
    """For messages, such as "budget is 20 tokens"."""
    floor: int | None = None
    """`min_budget`, if it raised the number that `budget_ratio` gives."""


def _whole(length: int) -> _Budget:
    reason = f"prompt + max_new is {length} tokens and preset full keeps them all"
    return _Budget(length, "preset", reason)


def _choose_budget(sources: Sequence[CachePolicy | TablePolicy], length: int) -> _Budget:
    """Return the budget of the first source that has one; `sources` start with the request."""
    for source in sources:
        if source.budget is not None:
            reason = f"{_whose(source, sources)}budget is {source.budget} tokens"
            return _Budget(source.budget, "budget", reason)
        if source.budget_ratio is not None:
            return _budget_by_ratio(source, source.budget_ratio, sources, length)
    raise InvalidArgument("cache_policy.budget", "no budget given; accepted: 1 or more tokens")


def _budget_by_ratio(
    source: CachePolicy | TablePolicy,
    ratio: float,
    sources: Sequence[CachePolicy | TablePolicy],
    length: int,
) -> _Budget:
    limiting = next((one for one in sources if one.min_budget is not None), None)
    floor = limiting.min_budget if limiting else None
    budget, least = math.floor(ratio * length + 0.5), min(floor or 0, length)
    if limiting and budget < least:
        reason = (
            f"{_whose(limiting, sources)}min_budget {floor} raises the budget to {least} tokens"
        )
        return _Budget(least, "min_budget", reason, floor)
    reason = f"{_whose(source, sources)}budget_ratio {ratio:g} of {length} tokens"
    if budget < 1:
        raise InvalidArgument(
            _written_field(sources[0], "budget_ratio"), f"{reason} is less than one slot"
        )
    return _Budget(budget, "budget_ratio", f"{reason} is {budget} tokens")


def _whose(source: CachePolicy | TablePolicy, sources: Sequence[CachePolicy | TablePolicy]) -> str:
    """Return "" for the request, so that a message names a field as the user wrote it."""
    if source is sources[0]:
        return ""
    return "the table's " if isinstance(source, TablePolicy) else "the server's "


def _written_field(request: CachePolicy | TablePolicy, *names: str) -> str:
    """Return the first of these fields that the request sets, else the policy as a whole."""
    for name in (*names, "preset", "table", "alpha"):
        if getattr(request, name, None) is not None:
            return f"cache_policy.{name}"
    return "cache_policy"


def _check_slab(
    request: CachePolicy, budget: _Budget, budgets: Heads, slots: Sequence[Sequence[int]] | int
) -> None:
    """Refuse a policy if any head needs more slots than a row has for that head."""
    there = tuple((slots,) * len(layer) for layer in budgets) if isinstance(slots, int) else slots
    flat, equal = len(set(chain(*there))) == 1, len(set(chain(*budgets))) == 1
    heads = [(layer, head) for layer, row in enumerate(budgets) for head in range(len(row))]
    layer, head = max(heads, key=lambda at: budgets[at[0]][at[1]] - there[at[0]][at[1]])
    needs, has = budgets[layer][head], there[layer][head]
    if needs <= has:
        return
    asked = budget.reason
    if not equal:
        asked += (
            f" per head on average, and head_share gives layer {layer} head {head} {needs} slots"
        )
    elif not flat and budget.field != "preset":
        asked += " in every head"
    if flat:
        room = f"accepted: at most {has} slots" + ("" if equal else " in every head")
    else:
        room = f"layer {layer} head {head} has {has} slots (rows follow head_share)"
    remedy = "shorten the request" if budget.field == "preset" else f"lower {budget.field}"
    raise InvalidArgument(
        _written_field(request, budget.field, "budget_ratio"),
        f"{asked}; {room}; {remedy} or raise --slots",
    )


def _check_room(request: CachePolicy, budget: _Budget, recent: int, sinks: int) -> None:
    """Refuse a policy that must evict and has no token that may be evicted.

    It is enough to check a head of the mean budget: if that one has room, `split_slots` gives every
    head room.
    """
    needed = sinks + recent + 1
    if budget.slots >= needed:
        return
    fields, remedy = ["recent", "recent_share", "sinks"], "lower sinks or recent"
    # The preset full has no budget that could be raised.
    if budget.field != "preset":
        fields = [budget.field, "budget_ratio", *fields]
        remedy = f"raise {budget.field}, or {remedy}"
    raise InvalidArgument(
        _written_field(request, *fields),
        f"{budget.reason}, and sinks {sinks} + recent {recent} + 1 for the newest need {needed}; "
        f"{remedy}",
    )


def _first(values: Iterable[int | None], default: int) -> int:
    return next((value for value in values if value is not None), default)


def _recent(sources: Iterable[CachePolicy | TablePolicy], room: int) -> int:
    for source in sources:
        if source.recent is not None:
            return source.recent
        if source.recent_share is not None:
            return math.floor(source.recent_share * max(room, 0))
    return 0
