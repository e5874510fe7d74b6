"""Computes the memory of a planned server: bytes, rows, and the server's options.

Owns the plan's memory: it applies the server's own options and checks, and computes how many rows
fit. Knows nothing of time or of the plan's output.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from a2sf import reference
from a2sf.cache.slot_shares import Shares, slots_per_head, split_slots
from a2sf.errors import A2SFError, InvalidArgument, NotFound, TableMismatch
from a2sf.model import dtypes
from a2sf.model.locate import REFERENCE
from a2sf.model.spec import ModelSpec, read_model_spec
from a2sf.policy import DEFAULT_SINKS, Heads
from a2sf.schema import AlphaTable
from a2sf.tablefile import load_table
from service.backend.default_table import check_default, row_shape
from service.config.options import ServerOptions
from service.plan import capacity, units
from service.plan.capacity import Weights

DEVICES = ("cuda", "cpu")

DEFAULT_CONTEXT = 8192
"""Default tokens of a full cache's sequence. A model's whole context is far longer than most of its
sequences, and would make every smaller cache look too good."""


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """The command line's arguments. Names shared with `serve` have the same meaning there."""

    model: str
    revision: str | None
    device: str
    dtype: str
    tables: Path | None
    default_table: str | None
    budget: int
    """Tokens that each head keeps of a sequence, averaged over heads."""
    slots: int | None
    """None: equal to the budget."""
    min_budget: int | None
    """None: the server's default."""
    max_batch: int | None
    """None: as many as fit."""
    max_prefill_tokens: int | None
    memory: int | None
    """Bytes of the device; None: do not check what fits."""
    reserve: str
    """A size, or a percentage of the memory."""
    context: int | None
    """Tokens of a sequence in the full cache. None: the length of a request of the load, or without
    one the model's context, but at most the larger of DEFAULT_CONTEXT and the budget."""
    request_tokens: int | None
    """Prompt and completion tokens of a request of the load; None: no lengths are given."""


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """The sizes of the planned server. All memory is in bytes."""

    spec: ModelSpec
    weights: Weights
    options: dict[str, Any]
    """Options that start the server, by the settings' names."""
    budget: int
    context: int
    context_from: str
    """Source of `context`, in words."""
    head_slots: Heads
    """Slots of a row in each layer and KV head."""
    cached_tokens: int
    """Tokens that a sequence of `context` keeps, summed over layers and KV heads."""
    staging_slots: int
    row: int
    """One row of the slab: one sequence of any length."""
    staging: int
    memory: int | None
    reserve: int
    rows: int
    """Rows of the slab."""
    full_sequence: int
    """A sequence of `context` tokens in a cache that keeps all tokens."""
    full_rows: int
    """How many such sequences fit beside the weights, but at most max_batch."""

    @property
    def full_tokens(self) -> int:
        """Tokens of a full cache's sequence, summed over layers and KV heads."""
        shape = self.spec.shape
        return shape.num_layers * shape.num_kv_heads * self.context

    @property
    def slab(self) -> int:
        """All rows together."""
        return self.rows * self.row

    @property
    def free(self) -> int:
        """Unused memory; less than a row if all rows that fit are used."""
        assert self.memory is not None
        taken = self.weights.nbytes + self.staging + self.slab + self.reserve
        return self.memory - taken


def size(inputs: PlanInputs) -> Sizing:
    """Compute what fits. Reads settings, headers and tables; loads no weights.

    Raises the errors of starting such a server, and InvalidArgument if nothing fits.
    """
    if inputs.device not in DEVICES:
        raise InvalidArgument("--device", f"{inputs.device!r}; accepted: {', '.join(DEVICES)}")
    if inputs.memory is None and inputs.max_batch is None:
        raise InvalidArgument(
            "--gpu-memory",
            "missing, and without it the number of sequences is unknown; accepted: a size such as "
            "80GB, or instead --gpu with a known name, or --max-batch with a number of sequences",
        )
    least = DEFAULT_SINKS + 1
    if inputs.budget < least:
        raise InvalidArgument(
            "--budget", f"{inputs.budget}; accepted: {least} (sinks and the newest token) or more"
        )
    if inputs.slots is not None and inputs.slots < inputs.budget:
        raise InvalidArgument(
            "--slots", f"{inputs.slots}; accepted: {inputs.budget} (the budget) or more"
        )
    spec = read_model_spec(
        inputs.model, revision=inputs.revision, device_type=inputs.device, dtype=inputs.dtype
    )
    options = _options(inputs, spec)
    shape = spec.shape
    shares: Shares = ((1.0,) * shape.num_kv_heads,) * shape.num_layers
    row_slots: Heads | None = None
    if inputs.default_table is not None:
        table = _table(inputs, spec)
        shares = table.policy.head_share
        slots = slots_per_head(options["slots"], shares, shape.max_context)
        if len(set(chain(*slots))) == 1:
            options["default_budget"] = inputs.budget
        server = ServerOptions(**options)
        row_slots = row_shape(server, table, shape.max_context)
        check_default(server, slots, shape.max_context, table)
    else:
        options["default_budget"] = inputs.budget
    config = ServerOptions(**options).engine_config(row_slots)
    head_slots = config.head_slots(shape.num_layers, shape.num_kv_heads)
    staging_slots = config.staging_slots(shape.max_context)
    context, context_from = _context(inputs, shape.max_context)
    weights = capacity.weights(spec)
    heads = shape.num_layers * shape.num_kv_heads
    row = capacity.slots_nbytes(spec, 1, head_slots)
    equal = ((staging_slots,) * shape.num_kv_heads,) * shape.num_layers
    staging = capacity.slots_nbytes(spec, 1, equal)
    full_sequence = capacity.vectors_nbytes(spec, heads * context)
    if inputs.memory is None:
        assert inputs.max_batch is not None
        reserve, rows, full_rows = 0, inputs.max_batch, inputs.max_batch
    else:
        reserve = units.parse_reserve("--reserve", inputs.reserve, inputs.memory)
        room = inputs.memory - reserve - weights.nbytes
        rows = _rows(inputs, room - staging, row)
        most = max(room // full_sequence, 0)
        full_rows = most if inputs.max_batch is None else min(most, inputs.max_batch)
    budgets = split_slots(inputs.budget, shares, context)
    return Sizing(
        spec=spec,
        weights=weights,
        options={**options, "max_batch": rows},
        budget=inputs.budget,
        context=context,
        context_from=context_from,
        head_slots=head_slots,
        cached_tokens=sum(min(budget, context) for budget in chain(*budgets)),
        staging_slots=staging_slots,
        row=row,
        staging=staging,
        memory=inputs.memory,
        reserve=reserve,
        rows=rows,
        full_sequence=full_sequence,
        full_rows=full_rows,
    )


def _context(inputs: PlanInputs, longest: int) -> tuple[int, str]:
    """Return the length of the full cache's sequences, and its source in words."""
    if inputs.context is not None:
        if inputs.context > longest:
            raise InvalidArgument(
                "--context", f"{inputs.context}; accepted: at most {longest} (the model's context)"
            )
        return inputs.context, "by --context"
    if inputs.request_tokens is not None:
        # A request longer than the model's context is refused when the load is checked.
        return min(inputs.request_tokens, longest), "prompt and completion of a request"
    usual = max(DEFAULT_CONTEXT, inputs.budget)
    if usual >= longest:
        return longest, "the model's context; --context sets another"
    return usual, f"of the model's {longest:,}; --context sets another"


def _options(inputs: PlanInputs, spec: ModelSpec) -> dict[str, Any]:
    """Return the server's settings that were given, in the order of the command line.

    On a CPU, the dtype is always included, because another machine might choose another.
    """
    chosen = inputs.dtype != "auto" or spec.device_type == "cpu"
    given = {
        "model": inputs.model,
        "revision": inputs.revision,
        "device": inputs.device,
        "dtype": dtypes.name(spec.dtype) if chosen else None,
        "tables": inputs.tables,
        "default_table": inputs.default_table,
        "slots": inputs.slots or inputs.budget,
        "min_budget": inputs.min_budget,
        "max_prefill_tokens": inputs.max_prefill_tokens,
    }
    return {name: value for name, value in given.items() if value is not None}


def _rows(inputs: PlanInputs, room: int, row: int) -> int:
    """Return how many rows to plan for. Raises InvalidArgument if they do not fit."""
    most = room // row
    if inputs.max_batch is not None and most >= 1:
        if inputs.max_batch > most:
            raise InvalidArgument(
                "--max-batch",
                f"{inputs.max_batch} rows of {units.binary(row)} do not fit beside weights, "
                f"staging row and reserve; accepted: at most {most}",
            )
        return inputs.max_batch
    if most < 1:
        raise InvalidArgument(
            "--gpu-memory",
            f"weights, staging row, reserve and one row need {units.binary(row - room)} more; give "
            "more memory, a smaller --budget, --max-prefill-tokens or --reserve, or a smaller "
            "--dtype",
        )
    return most


def _table(inputs: PlanInputs, spec: ModelSpec) -> AlphaTable:
    """Find the default table like the server, without checking the fingerprint of the weights."""
    directory = inputs.tables
    if directory is None and inputs.model == REFERENCE:
        directory = reference.path() / "tables"
    if directory is None or not directory.is_dir():
        raise NotFound(f"tables directory {directory or '--tables'}: no such directory")
    found = {}
    for path in sorted(directory.glob("*.json")):
        try:
            table = load_table(path)
        except A2SFError:
            # Like the server: a bad file does not hide a good one.
            continue
        found[table.name] = table
    if inputs.default_table not in found:
        raise NotFound(
            f"no alpha table {inputs.default_table!r} in {directory}; found: "
            f"{', '.join(sorted(found)) or 'none'}"
        )
    table = found[inputs.default_table]
    shape = spec.shape
    if (table.model.num_layers, table.model.num_kv_heads) != (shape.num_layers, shape.num_kv_heads):
        raise TableMismatch(
            f"alpha table {table.name!r} is for {table.model.num_layers} layers of "
            f"{table.model.num_kv_heads} KV heads; the model has {shape.num_layers} of "
            f"{shape.num_kv_heads}"
        )
    return table
