"""Loads the model, its engine and its alpha tables from the settings.

Owns loading, which runs in the engine's thread; how the default table at startup sets the shape of
the engine's rows; and which tables may replace the default in those rows. Knows nothing of handlers
or of how the server starts and stops.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import chain

import structlog

from a2sf import reference
from a2sf.cache.budgets import resolve, slots_for
from a2sf.engine.admission import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.engine.parallel import Follower, LeadingEngine
from a2sf.errors import InvalidArgument, NotFound, TableInvalid
from a2sf.model.loader import LoadedModel, load_model
from a2sf.model.locate import REFERENCE
from a2sf.model.tensor_parallel import Ranks, leave, num_processes
from a2sf.policy import CachePolicy, Heads, policy_if_omitted
from a2sf.schema import AlphaTable
from a2sf.text import chat_template
from a2sf.threads import set_threads
from service.backend.tables import TableCatalog, TableStore
from service.config.options import ServerOptions, Shares, heads_of
from service.policy_messages import in_words

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Core:
    """What is served. Only the runner's thread may use the engine; the rest is read only."""

    model: LoadedModel
    engine: Engine
    config: EngineConfig
    """Its default policy names no table. A request without a method uses `tables.now.default`,
    which may change, or `a2sf.policy.DEFAULT_METHOD` if there is no default table."""
    tables: TableCatalog

    def close(self) -> None:
        """Let the other processes of the model end, if there are any; call it when nothing runs."""
        if isinstance(self.engine, LeadingEngine):
            self.engine.close()
            leave()


def load_core(options: ServerOptions) -> Core:
    """Load the model and the tables and build the engine; takes seconds to minutes.

    Raises NotFound, Unsupported, InvalidArgument or TableError for what cannot be served.
    """
    config = options.engine_config(None)
    directory = options.tables
    if directory is not None and not directory.is_dir():
        # Checked before the model is loaded, which is slow.
        raise NotFound(f"tables directory {directory}: no such directory")
    threads = set_threads(options.threads)
    ranks = Ranks.join(options.device) if num_processes() > 1 else None
    model = _load_model(options, ranks)
    chat_template.choose_template(model.tokenizer, options.chat_template)
    shipped = reference.path() / "tables"
    if directory is None and options.model == REFERENCE and shipped.is_dir():
        directory = shipped
    tables = TableCatalog(directory, model.identity)
    if options.default_table is not None:
        shape = row_shape(options, tables.now.lookup(options.default_table))
        config = options.engine_config(shape)
    rows = config.head_slots(model.shape.num_layers, model.identity.num_kv_heads)
    tables.settle(
        options.default_table, partial(check_default, options, rows, model.shape.max_context)
    )
    try:
        engine = LeadingEngine(model, config, ranks) if ranks else Engine(model, config)
    except (MemoryError, RuntimeError) as error:  # torch raises either one, by device
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InvalidArgument(
            "--max-batch",
            f"{config.max_batch} rows of {config.slots} slots do not fit into memory; lower "
            f"--max-batch or --slots ({reason})",
        ) from error
    log.info(
        "loaded",
        model=model.identity.id,
        device=str(model.device),
        dtype=str(model.dtype),
        dtype_reason=model.dtype_reason,
        threads=threads,
        kernels=engine.kernels,
        rows=config.max_batch,
        slots=config.slots,
        shape=_written(rows, options),
        slab_bytes=engine.kv_slab_bytes,
        staging_bytes=engine.kv_staging_bytes,
        tables=len(tables.now.tables),
        refused=len(tables.now.refused),
        default_table=options.default_table,
    )
    tell_default(config, tables.now)
    return Core(model=model, engine=engine, config=config, tables=tables)


def load_follower(options: ServerOptions) -> Follower:
    """Load this process's part of a model that another process serves with `load_core`.

    Raises the same errors, and RankLost if the other process ends.
    """
    set_threads(options.threads)
    ranks = Ranks.join(options.device)
    return Follower(_load_model(options, ranks), ranks)


def _load_model(options: ServerOptions, ranks: Ranks | None) -> LoadedModel:
    return load_model(
        options.model,
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
        ranks=ranks,
    )


def default_policy(config: EngineConfig, store: TableStore) -> CachePolicy:
    """Return the policy of a request that sets none, for one state of the tables."""
    default = store.default
    return policy_if_omitted(
        config.default_policy, None if default is None else store.lookup(default)
    )


def tell_default(config: EngineConfig, store: TableStore) -> None:
    """Log the policy of a request that sets none, and the lower bound of ratios, in one line."""
    log.info(
        "default policy",
        policy=in_words(default_policy(config, store)),
        min_budget=config.default_policy.min_budget,
    )


def row_shape(options: ServerOptions, table: AlphaTable) -> Shares | None:
    """Return the shares by which the default table shapes rows, or None if all are equal.

    Raises InvalidArgument if the server's default policy would not always fit. A budget that is a
    ratio depends on the length of each request, and is never below its lower bound.
    """
    shares, fitted = table.policy.head_share, table.policy.budget or 0
    floor = _floor(options, table)
    wanted = max(options.budget(shares), fitted, floor)
    slots = heads_of(options.slots, shares)
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
    wanted = heads_of(options.slots, policy.head_share)
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
        floor, narrowest = _floor(options, table), min(chain(*rows))
        if floor > narrowest:
            raise TableInvalid(
                f"{cannot}: its ratio comes to no fewer than {floor} tokens (min_budget), of which "
                f"a request that has just as many needs {floor} slots in every head, and the "
                f"narrowest has {narrowest}; {start} and "
                f"--slots {slots_for(floor, policy.head_share)} or more"
            )
        return
    budget = policy.budget
    peaks = [[budget] * len(row) for row in rows] if alike else _peaks(budget, policy.head_share)
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


def _floor(options: ServerOptions, table: AlphaTable) -> int:
    """Return the lower bound in slots of a default table's ratio; 0 if its budget is no ratio."""
    policy = table.policy
    if policy.budget is not None:
        return 0
    return options.floor(policy.head_share) if policy.min_budget is None else policy.min_budget


def _peaks(budget: int, shares: Shares) -> list[list[int]]:
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


def _written(rows: Heads, options: ServerOptions) -> str:
    """Describe the slots of a row's heads for the log: flat, or the fewest and the most."""
    slots = list(chain(*rows))
    equal = len(set(slots)) == 1
    return "flat" if equal else f"{options.default_table}:{min(slots)}-{max(slots)}"
