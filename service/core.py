"""What is served: the model, its engine and its alpha tables, loaded from the settings.

Owns loading, which the engine's thread runs, and how the default table shapes the engine's rows.
Knows nothing of handlers or of the server's life.
"""

import logging
from dataclasses import dataclass

from a2sf import reference
from a2sf.admission import EngineConfig
from a2sf.engine import Engine
from a2sf.errors import InvalidArgument, NotFound
from a2sf.files import REFERENCE
from a2sf.models import LoadedModel, load_model
from a2sf.policy import slots_for
from a2sf.schema import AlphaTable
from a2sf.threads import set_threads
from service.options import ServerOptions, layers_of
from service.tables import TableStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Core:
    """What is served. The engine belongs to the runner's thread; the rest is read only."""

    model: LoadedModel
    engine: Engine
    config: EngineConfig
    tables: TableStore


def load_core(options: ServerOptions) -> Core:
    """Load the model and the tables and build the engine; takes seconds to minutes.

    Raises NotFound, Unsupported, InvalidArgument or TableError for what cannot be served.
    """
    config = options.engine_config(None)
    directory = options.tables
    if directory is not None and not directory.is_dir():
        # Said before the model is loaded, which takes a while.
        raise NotFound(f"tables directory {directory}: no such directory")
    threads = set_threads(options.threads)
    model = load_model(
        options.model, revision=options.revision, device=options.device, dtype=options.dtype
    )
    shipped = reference.path() / "tables"
    if directory is None and options.model == REFERENCE and shipped.is_dir():
        directory = shipped
    tables = TableStore.read(directory, model.identity) if directory else TableStore()
    if options.default_table is not None:
        shape = _shape(options, tables.lookup(options.default_table))
        config = options.engine_config(shape)
    try:
        engine = Engine(model, config)
    except (MemoryError, RuntimeError) as error:  # torch raises either, by device
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InvalidArgument(
            "max-batch",
            f"{config.max_batch} rows of {config.slots} slots do not fit into memory; lower "
            f"--max-batch or --slots ({reason})",
        ) from error
    log.info(
        "model=%s device=%s dtype=%s threads=%d rows=%d slots=%d shape=%s slab_bytes=%d "
        "staging_bytes=%d tables=%d refused=%d",
        *(model.identity.id, model.device, model.dtype, threads),
        *(config.max_batch, config.slots, _written(config, options, model.shape.num_layers)),
        *(engine.kv_slab_bytes, engine.kv_staging_bytes),
        *(len(tables.tables), len(tables.refused)),
    )
    return Core(model=model, engine=engine, config=config, tables=tables)


def _shape(options: ServerOptions, table: AlphaTable) -> tuple[float, ...] | None:
    """Return the shares by which the default table shapes rows, or None where they are equal.

    Raises InvalidArgument where what the server gives without being asked would not always fit. A
    budget that is a ratio is as large as each request makes it.
    """
    shares, fitted = table.policy.layer_share, table.policy.budget
    wanted = max(options.budget(shares), fitted or 0)
    layers = layers_of(options.slots, shares)
    narrowest = min(layers)
    if wanted <= narrowest:
        return None if len(set(layers)) == 1 else shares
    budget = (
        f"{table.name} was fitted for a budget of {fitted} tokens"
        if wanted == fitted
        else f"--default-budget is {wanted} tokens"
    )
    room = f"there are {options.slots} slots"
    if narrowest < options.slots:
        room = (
            f"of {options.slots} slots, dealt by this table's layer_share, layer "
            f"{layers.index(narrowest)} gets {narrowest}, while a request without unequal layers "
            "or shorter than its budget needs the whole budget in every layer"
        )
    enough = (fitted or 0) <= narrowest
    less = f", or --default-budget {narrowest} or less" if enough else ""
    raise InvalidArgument(
        "default-table",
        f"{budget}, and {room}; give --slots {slots_for(wanted, shares)} or more{less}",
    )


def _written(config: EngineConfig, options: ServerOptions, num_layers: int) -> str:
    """How slots are spread over a row's layers, for the log."""
    if config.layer_share is None:
        return "flat"
    return f"{options.default_table}:{','.join(map(str, config.layer_slots(num_layers)))}"
