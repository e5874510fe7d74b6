"""What the server is started with, and loading what it serves.

Owns the settings, their checks that need no model, and `load_core`, which the engine's thread runs.
Knows nothing of the command line or of handlers.
"""

import ipaddress
import logging
from pathlib import Path

from pydantic import ValidationError

from a2sf import reference
from a2sf.admission import EngineConfig
from a2sf.engine import Engine
from a2sf.errors import InvalidArgument, NotFound
from a2sf.files import REFERENCE
from a2sf.models import load_model
from a2sf.policy import DEFAULT_SINKS, CachePolicy, deal, slots_for
from a2sf.schema import AlphaTable, Count, Frozen, Positive, first_problem
from a2sf.threads import set_threads
from service.servicers import Core
from service.tables import TableStore

log = logging.getLogger(__name__)

MAX_PORT = 65535

DEFAULT_BUDGET = 256


class ServerOptions(Frozen):
    """Everything that `serve` can be told."""

    model: str = REFERENCE
    """`reference`, a directory, or a hub id."""
    revision: str | None = None
    tables: Path | None = None
    """Directory of alpha tables; None: those that ship with the reference model, for that model."""
    default_table: str | None = None
    """Table of requests that name no method; None: preset h2o."""
    host: str = "127.0.0.1"
    port: Count = 50051
    """0 lets the system choose."""
    insecure_bind: bool = False
    """Whether plain text may leave this machine."""
    max_batch: Positive = 8
    slots: Positive = 1024
    default_budget: Positive | None = None
    """None: DEFAULT_BUDGET, or what the narrowest layer of a row has where that is less."""
    max_prefill_tokens: Positive | None = None
    step_tokens: Positive = 512
    max_waiting: Count = 64
    threads: Positive | None = None
    """Threads of a processor's computations; None: the processors that the process may use."""
    device: str = "auto"
    dtype: str = "auto"
    port_file: Path | None = None
    grace_s: float = 30.0
    """Seconds that running requests get to finish once the server is told to stop."""

    @property
    def address(self) -> str:
        """Where to listen. Raises InvalidArgument for what must not be listened on."""
        if self.port > MAX_PORT:
            raise InvalidArgument("port", f"{self.port}; accepted: 0 to {MAX_PORT}")
        if not self.insecure_bind and not _is_loopback(self.host):
            raise InvalidArgument(
                "host",
                f"{self.host} can be reached from outside, and this server speaks plain text "
                "without authentication; bind 127.0.0.1, or say --insecure-bind where the "
                "network itself is trusted",
            )
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def budget(self, layer_share: tuple[float, ...] | None) -> int:
        """What a request gets without asking, where rows have these shares (None: equal layers)."""
        if self.default_budget is not None:
            return self.default_budget
        return min(DEFAULT_BUDGET, *_layers(self.slots, layer_share or (1.0,)))

    def engine_config(self, layer_share: tuple[float, ...] | None) -> EngineConfig:
        """The engine's sizes, with rows of equal layers or (not None) of these shares.

        Raises InvalidArgument where sizes contradict each other.
        """
        least = DEFAULT_SINKS + 1
        budget = self.budget(layer_share)
        if self.default_budget is None and budget < least:
            raise InvalidArgument(
                "slots",
                f"{self.slots}, of which the narrowest layer gets {budget}; accepted: "
                f"{slots_for(least, layer_share or (1.0,))} or more",
            )
        if not least <= budget <= self.slots:
            raise InvalidArgument(
                "default-budget",
                f"{budget}; accepted: {least} (sinks and the newest token) to {self.slots} (slots)",
            )
        # A table brings a budget of its own; the server's is for requests that name another method.
        method = {"table": self.default_table} if self.default_table else {"preset": "h2o"}
        try:
            return EngineConfig(
                slots=self.slots,
                layer_share=layer_share,
                max_batch=self.max_batch,
                max_prefill_tokens=self.max_prefill_tokens,
                step_tokens=self.step_tokens,
                max_waiting=self.max_waiting,
                default_policy=CachePolicy.model_validate({**method, "budget": budget}),
            )
        except ValidationError as error:
            raise InvalidArgument("options", first_problem(error)) from error


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
    layers = _layers(options.slots, shares)
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


def _layers(slots: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Slots of each layer of a row."""
    return deal(slots, shares, slots * len(shares))


def _written(config: EngineConfig, options: ServerOptions, num_layers: int) -> str:
    """How slots are spread over a row's layers, for the log."""
    if config.layer_share is None:
        return "flat"
    return f"{options.default_table}:{','.join(map(str, config.layer_slots(num_layers)))}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
