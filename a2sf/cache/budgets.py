"""From a policy's optional fields to plain numbers: the budget, window and alpha of every head.

Owns `resolve`, which combines the fields of the request, its table and the server, the numbers of
the presets, and the split of slots among heads. In its result no budget is a ratio and no window a
share. Knows nothing of tensors or of transport.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain, islice, pairwise

from a2sf.errors import InvalidArgument
from a2sf.policy import (
    DEFAULT_PREFILL_CHUNK,
    DEFAULT_SINKS,
    CachePolicy,
    EffectivePolicy,
    Heads,
    Preset,
)
from a2sf.schema import AlphaTable, TablePolicy


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
