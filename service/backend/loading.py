"""Loads the model, its engine and its alpha tables from the settings.

Owns loading, which runs in the engine's thread, and its errors. Knows nothing of handlers, or of
how the server starts and stops. `service.backend.default_table` decides which tables fit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import structlog

from a2sf import reference
from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.engine.parallel import Follower, LeadingEngine
from a2sf.errors import InvalidArgument, NotFound, TableError, Unsupported
from a2sf.model.loader import LoadedModel, load_model
from a2sf.model.locate import REFERENCE
from a2sf.model.tensor_parallel import Ranks, leave, num_processes
from a2sf.policy import Heads
from a2sf.text import chat_template
from a2sf.threads import set_threads
from service.backend.default_table import check_default, log_default_policy, row_shape
from service.backend.tables import TableCatalog
from service.config.options import ServerOptions

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
        raise NotFound(f"--tables: {directory}: no such directory")
    threads = set_threads(options.threads)
    ranks = Ranks.join(options.device) if num_processes() > 1 else None
    model = _load_model(options, ranks)
    chat_template.choose_template(model.tokenizer, options.chat_template)
    shipped = reference.path() / "tables"
    if directory is None and options.model == REFERENCE and shipped.is_dir():
        directory = shipped
    tables = TableCatalog(directory, model.identity)
    if options.default_table is not None:
        with _option_named("--default-table"):
            default = tables.now.lookup(options.default_table)
        shape = row_shape(options, default, model.shape.max_context)
        config = options.engine_config(shape)
    rows = config.head_slots(model.shape.num_layers, model.identity.num_kv_heads)
    tables.set_default(
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
        shape=_describe_rows(rows, options),
        slab_bytes=engine.kv_slab_bytes,
        staging_bytes=engine.kv_staging_bytes,
        tables=len(tables.now.tables),
        refused=len(tables.now.refused),
        default_table=options.default_table,
    )
    if max(chain(*rows)) > model.shape.max_context:
        log.warning(
            "rows are longer than the model's context",
            slots=config.slots,
            max_context=model.shape.max_context,
            advice=f"memory is unused; lower --slots to {model.shape.max_context}",
        )
    log_default_policy(config, tables.now)
    return Core(model=model, engine=engine, config=config, tables=tables)


def load_follower(options: ServerOptions) -> Follower:
    """Load this process's part of a model that another process serves with `load_core`.

    Raises the same errors, and RankLost if the other process ends.
    """
    set_threads(options.threads)
    ranks = Ranks.join(options.device)
    return Follower(_load_model(options, ranks), ranks)


def _load_model(options: ServerOptions, ranks: Ranks | None) -> LoadedModel:
    with _option_named("--model"):
        return load_model(
            options.model,
            revision=options.revision,
            device=options.device,
            dtype=options.dtype,
            ranks=ranks,
        )


@contextmanager
def _option_named(option: str) -> Iterator[None]:
    """Begin an error about what cannot be found, read or supported with its option.

    An argument that has the name of another option is reported as that option.
    """
    try:
        yield
    except InvalidArgument as error:
        if error.field in ("device", "dtype"):
            raise InvalidArgument(f"--{error.field}", error.problem) from error
        raise
    except (NotFound, Unsupported, TableError) as error:
        raise type(error)(f"{option}: {error}") from error


def _describe_rows(rows: Heads, options: ServerOptions) -> str:
    """Describe the slots of a row's heads for the log: flat, or the fewest and the most."""
    slots = list(chain(*rows))
    equal = len(set(slots)) == 1
    return "flat" if equal else f"{options.default_table}:{min(slots)}-{max(slots)}"
