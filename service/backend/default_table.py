"""The default table: which tables may be the default, and how it shapes the rows of the engine.

Owns the rules that make a request without a policy fit at every length, and their errors. Knows
nothing of files, of the model's weights, or of handlers.
"""

from itertools import chain

import structlog

from a2sf.cache.budgets import resolve
from a2sf.cache.slot_shares import max_slots_per_head, slots_for, slots_per_head
from a2sf.engine.config import EngineConfig
from a2sf.errors import InvalidArgument, TableInvalid
from a2sf.policy import DEFAULT_SINKS, CachePolicy, Heads, policy_if_omitted
from a2sf.schema import AlphaTable
from service.backend.tables import TableStore
from service.config.options import ServerOptions
from service.policy_messages import describe_policy

log = structlog.get_logger(__name__)


def default_policy(config: EngineConfig, store: TableStore) -> CachePolicy:
    """Return the policy of a request that sets none, for one state of the tables."""
    default = store.default
    return policy_if_omitted(
        config.default_policy, None if default is None else store.lookup(default)
    )


def log_default_policy(config: EngineConfig, store: TableStore) -> None:
    """Log the policy of a request that sets none, and the lower bound of ratios, in one line."""
    log.info(
        "default policy",
        policy=describe_policy(default_policy(config, store)),
        min_budget=config.default_policy.min_budget,
    )


def row_shape(options: ServerOptions, table: AlphaTable, max_context: int) -> Heads | None:
    """Return the slots of a row's heads as the default table splits them, or None if all are equal.

    Raises InvalidArgument, with everything that is too large, unless the defaults of the server and
    of the table fit at every length: their budgets, and their lower bounds of a ratio. A request
    with equal heads, or one no longer than its budget, needs the whole budget in every head.
    """
    policy, shares = table.policy, table.policy.head_share
    slots = slots_per_head(options.slots, shares, max_context)
    narrowest, layer, head = min(
        (has, layer, head) for layer, row in enumerate(slots) for head, has in enumerate(row)
    )
    limits = (
        (f"{table.name} was fitted for a budget of", policy.budget or 0, None),
        (f"min_budget of {table.name} is", policy.min_budget or 0, None),
        ("sinks and the newest token are", DEFAULT_SINKS + 1, None),
        ("--default-budget is", options.default_budget_for(slots), "--default-budget"),
        ("--min-budget is", options.min_budget_for(slots), "--min-budget"),
    )
    too_large = [limit for limit in limits if limit[1] > narrowest]
    if not too_large:
        return None if len(set(chain(*slots))) == 1 else slots
    room = f"a row has {options.slots} slots"
    if narrowest < options.slots:
        room = (
            f"of {options.slots} slots, split by this table's head_share, layer {layer} head "
            f"{head} gets {narrowest}, and a request with equal heads, or one no longer than its "
            "budget, needs the whole budget in every head"
        )
    wanted = max(tokens for _, tokens, _ in too_large)
    fix = f"give --slots {slots_for(wanted, shares, max_context)} or more"
    if all(option is not None for _, _, option in too_large):
        fix += ", or " + " and ".join(f"{option} {narrowest} or less" for _, _, option in too_large)
    problem = " and ".join(f"{words} {tokens} tokens" for words, tokens, _ in too_large)
    raise InvalidArgument("--default-table", f"{problem}, but {room}; {fix}")


def check_default(options: ServerOptions, rows: Heads, max_context: int, table: AlphaTable) -> None:
    """Check that a request without a policy fits at any length, with this default table.

    If the budget is a ratio, it depends on the length of each request. Then the rows must have the
    table's shares, so that --slots means the same as if the server had started with the table.

    Args:
        options: the server's settings.
        rows: [num_layers][num_kv_heads] slots of a row, fixed at startup.
        max_context: tokens of the longest request.
        table: a table for the served model.

    Raises TableInvalid if such a request does not always fit.
    """
    policy, start = table.policy, f"start the server with --default-table {table.name}"
    cannot = f"alpha table {table.name!r} cannot be the default"
    wanted = slots_per_head(options.slots, policy.head_share, max_context)
    alike = wanted == rows
    if policy.budget is None:
        if not alike:
            layer, head = next(
                (layer, head)
                for layer, (mine, row) in enumerate(zip(wanted, rows, strict=True))
                for head, (want, has) in enumerate(zip(mine, row, strict=True))
                if want != has
            )
            raise TableInvalid(
                f"{cannot}: its budget is a ratio, and rows are not split by its head_share: "
                f"layer {layer} head {head} has {rows[layer][head]} slots, and this table gives it "
                f"{wanted[layer][head]}; {start}"
            )
        floor, narrowest = policy.min_budget, min(chain(*rows))
        if floor is None:
            floor = options.min_budget_for(wanted)
        if floor > narrowest:
            raise TableInvalid(
                f"{cannot}: its budget is never below {floor} tokens (min_budget), a request of "
                f"that length needs {floor} slots in every head, and the narrowest head has "
                f"{narrowest}; {start} and "
                f"--slots {slots_for(floor, policy.head_share, max_context)} or more"
            )
        return
    # A request that sets a ratio gets at least the table's min_budget.
    budget = max(policy.budget, policy.min_budget or 0)
    name = "budget" if budget == policy.budget else "min_budget"
    peaks = (
        tuple((budget,) * len(row) for row in rows)
        if alike
        else max_slots_per_head(budget, policy.head_share, max_context)
    )
    _, layer, head = max(
        (peak - has, -layer, -head)
        for layer, (mine, row) in enumerate(zip(peaks, rows, strict=True))
        for head, (peak, has) in enumerate(zip(mine, row, strict=True))
    )
    peak, has = peaks[-layer][-head], rows[-layer][-head]
    if peak > has:
        raise TableInvalid(
            f"{cannot}: its {name} of {budget} tokens, split by its head_share, takes up to "
            f"{peak} slots of layer {-layer} head {-head}, which has {has}; {start} and "
            f"--slots {slots_for(budget, policy.head_share, max_context)} or more"
        )
    try:
        # Heads with small shares get the fewest slots when the sequence is longest.
        resolve(
            CachePolicy(),
            table=table,
            server=CachePolicy(table=table.name),
            length=max_context,
            slots=rows,
            num_layers=len(rows),
            num_kv_heads=table.model.num_kv_heads,
        )
    except InvalidArgument as error:
        raise TableInvalid(f"{cannot}: {error.problem}") from error
