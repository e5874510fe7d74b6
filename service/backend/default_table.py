"""The default table: which tables may be the default, and how it shapes the rows of the engine.

Owns the rules that make a request without a policy fit at every length, and their errors. Knows
nothing of files, of the model's weights, or of handlers.
"""

import math
from itertools import chain

import structlog

from a2sf.engine.admission import EngineConfig
from a2sf.errors import InvalidArgument, TableInvalid
from a2sf.policy import CachePolicy, Heads, policy_if_omitted, resolve, slots_for
from a2sf.schema import AlphaTable
from service.backend.tables import TableStore
from service.config.options import ServerOptions, Shares, slots_per_head
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


def row_shape(options: ServerOptions, table: AlphaTable) -> Shares | None:
    """Return the shares by which the default table shapes rows, or None if all are equal.

    Raises InvalidArgument if the server's default policy would not always fit. A budget that is a
    ratio depends on the length of each request, and is never below its lower bound.
    """
    shares, fitted = table.policy.head_share, table.policy.budget or 0
    floor = _lower_bound(options, table)
    wanted = max(options.default_budget_for(shares), fitted, floor)
    slots = slots_per_head(options.slots, shares)
    narrowest, layer, head = min(
        (has, layer, head) for layer, row in enumerate(slots) for head, has in enumerate(row)
    )
    if wanted <= narrowest:
        return None if len(set(chain(*slots))) == 1 else shares
    if wanted == fitted:
        budget = f"{table.name} was fitted for a budget of {fitted} tokens"
    elif wanted == floor:
        whose = "--min-budget" if table.policy.min_budget is None else f"min_budget of {table.name}"
        budget = f"{whose} is {floor} tokens"
    else:
        budget = f"--default-budget is {wanted} tokens"
    room = f"there are {options.slots} slots"
    if narrowest < options.slots:
        room = (
            f"of {options.slots} slots, dealt by this table's head_share, layer {layer} head "
            f"{head} gets {narrowest}, while a request whose heads get the same, or one shorter "
            "than its budget, needs the whole budget in every head"
        )
    less = ""
    if wanted not in (fitted, floor) and max(fitted, floor) <= narrowest:
        less = f", or --default-budget {narrowest} or less"
    elif wanted == floor and table.policy.min_budget is None:
        less = f", or --min-budget {narrowest} or less"
    raise InvalidArgument(
        "--default-table",
        f"{budget}, and {room}; give --slots {slots_for(wanted, shares)} or more{less}",
    )


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
    wanted = slots_per_head(options.slots, policy.head_share)
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
                f"{cannot}: its budget is a ratio, dealt by its head_share, and rows are not "
                f"dealt so: layer {layer} head {head} has {rows[layer][head]} slots, where this "
                f"table deals it {wanted[layer][head]}; {start}"
            )
        floor, narrowest = _lower_bound(options, table), min(chain(*rows))
        if floor > narrowest:
            raise TableInvalid(
                f"{cannot}: its ratio comes to no fewer than {floor} tokens (min_budget), of which "
                f"a request that has just as many needs {floor} slots in every head, and the "
                f"narrowest has {narrowest}; {start} and "
                f"--slots {slots_for(floor, policy.head_share)} or more"
            )
        return
    budget = policy.budget
    peaks = (
        [[budget] * len(row) for row in rows]
        if alike
        else _max_slots_per_head(budget, policy.head_share)
    )
    _, layer, head = max(
        (peak - has, -layer, -head)
        for layer, (mine, row) in enumerate(zip(peaks, rows, strict=True))
        for head, (peak, has) in enumerate(zip(mine, row, strict=True))
    )
    peak, has = peaks[-layer][-head], rows[-layer][-head]
    if peak > has:
        raise TableInvalid(
            f"{cannot}: its budget of {budget} tokens, dealt by its head_share, takes up to {peak} "
            f"slots of layer {-layer} head {-head}, which has {has}; {start} and "
            f"--slots {slots_for(budget, policy.head_share)} or more"
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


def _lower_bound(options: ServerOptions, table: AlphaTable) -> int:
    """Return the lower bound in slots of a default table's ratio; 0 if its budget is no ratio."""
    policy = table.policy
    if policy.budget is not None:
        return 0
    if policy.min_budget is not None:
        return policy.min_budget
    return options.min_budget_for(policy.head_share)


def _max_slots_per_head(budget: int, shares: Shares) -> list[list[int]]:
    """Return the most slots that each head takes of `budget`, over sequences of all lengths.

    No head takes more slots than the sequence has tokens; the rest goes to the other heads. So a
    head takes the most slots at the greatest length that it can hold completely; heads with larger
    shares hold that length completely too.
    """
    weights = list(chain(*shares))
    total = budget * len(weights)

    def peak(weight: float) -> int:
        return math.ceil(total * weight / sum(min(weight, other) for other in weights))

    return [[peak(weight) for weight in row] for row in shares]
