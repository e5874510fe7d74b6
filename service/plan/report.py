"""Formats a plan as text and as JSON.

Owns the wording, the columns and the names in the JSON. Computes nothing beyond formatting.
"""

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from a2sf.model import dtypes
from service.config.settings import NAMES, flag
from service.plan import capacity
from service.plan.capacity import Weights
from service.plan.pace import Pace, TimeSources, Workload
from service.plan.sizing import Sizing
from service.plan.units import binary

WIDTH, LABEL = 100, 12
"""Characters per line at most, and characters of a label before a row of numbers."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All results of planning."""

    sizing: Sizing
    sources: TimeSources
    load: Workload
    reserve_said: str
    this_cache: Pace | None
    full_cache: Pace | None

    @property
    def command(self) -> list[str]:
        """The command line that starts the planned server."""
        given = [
            part
            for field, value in self.sizing.options.items()
            for part in (flag(NAMES[field]), str(value))
        ]
        return ["python", "-m", "service", *given]


def as_text(plan: Plan) -> str:
    """Format the plan as text; lines have at most 100 characters, unless a name is long."""
    sections = (
        _head(plan),
        _memory(plan),
        _heads(plan),
        _sides(plan),
        _scoring(plan),
        _times(plan),
    )
    text = "\n\n".join("\n".join(lines) for section in sections if (lines := list(section)))
    return f"{text}\n\nStart it with\n  {shlex.join(plan.command)}"


def as_json(plan: Plan) -> str:
    """Format the plan as one JSON object; bytes, seconds and tokens are plain numbers."""
    sizing = plan.sizing
    tokens = sizing.cached_tokens
    multiplications, additions = capacity.scoring_operations(sizing.spec, tokens)
    shape = sizing.spec.shape
    return json.dumps(
        {
            "model": {
                "name": sizing.options["model"],
                "architecture": sizing.spec.architecture,
                **asdict(shape),
            },
            "device": sizing.spec.device_type,
            "dtype": _dtype(sizing),
            "dtype_reason": sizing.spec.dtype_reason,
            "weights": asdict(sizing.weights),
            "memory": {
                "device_bytes": sizing.memory,
                "weights_bytes": sizing.weights.nbytes,
                "staging_bytes": sizing.staging,
                "slab_bytes": sizing.slab,
                "reserve_bytes": sizing.reserve,
                "logits_bytes": capacity.logits_nbytes(sizing.spec, sizing.rows),
                "free_bytes": None if sizing.memory is None else sizing.free,
            },
            "this_cache": {
                "budget": sizing.budget,
                "head_slots": sizing.head_slots,
                "sequence_bytes": sizing.row,
                "rows": sizing.rows,
                "staging_slots": sizing.staging_slots,
                "scoring_multiplications": multiplications,
                "scoring_additions": additions,
                "attention_operations": capacity.attention_operations(sizing.spec, tokens),
                "pace": _pace(plan.this_cache),
            },
            "full_cache": {
                "context": sizing.context,
                "context_from": sizing.context_from,
                "sequence_bytes": sizing.full_sequence,
                "rows": sizing.full_rows,
                "pace": _pace(plan.full_cache),
            },
            "times_from": asdict(plan.sources),
            "load": asdict(plan.load),
            "command": plan.command,
        }
    )


def _head(plan: Plan) -> Iterator[str]:
    sizing, shape = plan.sizing, plan.sizing.spec.shape
    group = shape.num_attention_heads // shape.num_kv_heads
    yield f"{sizing.options['model']}: {sizing.spec.architecture}, {shape.num_layers} layers,"
    yield (
        f"{shape.num_kv_heads} KV heads of {shape.head_dim} with {group} query heads each, "
        f"{_dtype(sizing)} on {sizing.spec.device_type} ({sizing.spec.dtype_reason})"
    )


def _memory(plan: Plan) -> Iterator[str]:
    sizing, weights = plan.sizing, plan.sizing.weights
    yield "Memory, bytes"
    yield _bytes(
        "weights", weights.nbytes, f"{weights.parameters:,} parameters, {_counted(weights)}"
    )
    staging = f"prompt blocks of up to {sizing.staging_slots:,} tokens"
    yield _bytes("staging row", sizing.staging, staging)
    yield _bytes(
        "slab",
        sizing.slab,
        f"{sizing.rows:,} {'row' if sizing.rows == 1 else 'rows'} of {_slots(sizing)}",
    )
    if max(chain(*sizing.head_slots)) > sizing.spec.shape.max_context:
        yield (
            f"  A sequence fills at most {sizing.spec.shape.max_context:,} slots of a head (the "
            "model's context); the others are unused memory."
        )
    if sizing.memory is not None:
        logits = binary(capacity.logits_nbytes(sizing.spec, sizing.rows))
        note = f"--reserve {plan.reserve_said}; a step's logits take {logits} of it"
        yield _bytes("reserve", sizing.reserve, note)
        yield _bytes("left over", sizing.free, f"of {sizing.memory:,}")


def _heads(plan: Plan) -> Iterator[str]:
    """Yield the slots of each head, if they differ; a layer with many heads takes several lines."""
    slots = plan.sizing.head_slots
    if len(set(chain(*slots))) == 1:
        return
    width = max(len(f"{most:,}") for most in chain(*slots)) + 2
    many = (WIDTH - LABEL) // width
    yield "Slots of a row: one line per layer, one number per KV head"
    for layer, row in enumerate(slots):
        for first in range(0, len(row), many):
            label = "" if first else f"  layer {layer}"
            cells = "".join(f"{one:>{width},}" for one in row[first : first + many])
            yield f"{label:<{LABEL}}{cells}"


def _sides(plan: Plan) -> Iterator[str]:
    sizing = plan.sizing
    vectors = capacity.vectors_nbytes(sizing.spec, sum(chain(*sizing.head_slots)))
    full_nbytes = sizing.full_sequence
    yield _row("Sequences", "this cache", "full cache")
    kept = min(sizing.budget, sizing.context)
    yield _row("  tokens of a sequence kept", f"{kept:,}", f"{sizing.context:,}")
    yield _row("  bytes of keys and values", f"{vectors:,}", f"{full_nbytes:,}")
    yield _row("  positions and scores", f"{sizing.row - vectors:,}", "0")
    yield _row("  bytes together", f"{sizing.row:,}", f"{full_nbytes:,}")
    yield _row("", binary(sizing.row), binary(full_nbytes))
    yield _row("  sequences at a time", f"{sizing.rows:,}", f"{sizing.full_rows:,}")
    yield f"  Full cache: {sizing.context:,} tokens a sequence, {sizing.context_from}."


def _scoring(plan: Plan) -> Iterator[str]:
    spec, tokens = plan.sizing.spec, plan.sizing.cached_tokens
    multiplications, additions = capacity.scoring_operations(spec, tokens)
    attention = capacity.attention_operations(spec, tokens)
    full_operations = capacity.attention_operations(spec, plan.sizing.full_tokens)
    yield _row("Operations of a token", "this cache", "full cache")
    yield _row("  attention", f"{attention:,}", f"{full_operations:,}")
    yield _row("  multiplications by alpha", f"{multiplications:,}", "0")
    yield _row("  additions of attention", f"{additions:,}", "0")
    yield _row("  scoring over attention", f"{(multiplications + additions) / attention:.2%}", "0")


def _times(plan: Plan) -> Iterator[str]:
    this_cache, full_cache, load = plan.this_cache, plan.full_cache, plan.load
    if this_cache is None:
        yield "Times: give --gpu, --bandwidth or --step-ms"
        return
    measured = this_cache.taken_from == "measured"
    yield _row("Times, as measured" if measured else "Times, bounds", "this cache", "full cache")
    for label, show in _figures(this_cache, load):
        yield _row(f"  {label}", show(this_cache), "-" if full_cache is None else show(full_cache))
    yield "  Scores: a step reads each slot's position and score, and writes the score: 12 bytes."
    if not measured:
        yield "  Upper bounds of speed from published figures, not measurements. The sequences of"
        yield "  this cache are at their budget, those of the full cache at their whole length."
    if load.prompt_tokens is None and (this_cache.replicas or this_cache.price_per_million):
        yield "  Without prefill: to include it, give --prompt-tokens and --completion-tokens."
    if this_cache.replicas is not None or this_cache.price_per_million is not None:
        yield f"  {_load(load)}each replica is busy {load.utilisation:.0%} of the time."


def _figures(this_cache: Pace, load: Workload) -> Iterator[tuple[str, Callable[[Pace], str]]]:
    """Yield the rows of times: the label, and a function that formats the value."""
    yield "bytes moved per step", lambda pace: f"{pace.step_nbytes:,}"
    yield "  of these for scores", lambda pace: f"{pace.scores_nbytes:,}"
    yield "milliseconds per step", lambda pace: f"{pace.step_s * 1e3:,.2f}"
    yield "taken from", lambda pace: pace.taken_from
    yield "tokens/s, all sequences", lambda pace: f"{pace.tokens_per_s:,.0f}"
    yield "tokens/s, each sequence", lambda pace: f"{1 / pace.step_s:,.1f}"
    if this_cache.prompt_s is not None:
        yield "milliseconds per prompt", lambda pace: f"{(pace.prompt_s or 0.0) * 1e3:,.1f}"
    least = "" if this_cache.taken_from == "measured" else ", least"
    if this_cache.replicas is not None:
        yield f"replicas{least}", lambda pace: f"{pace.replicas:,}"
    if this_cache.price_per_million is not None:
        yield f"price, 1e6 tokens{least}", lambda pace: f"{pace.price_per_million:,.3f}"


def _load(load: Workload) -> str:
    """Describe the load for replicas and price, as the beginning of a sentence."""
    if load.tokens_per_s is not None:
        return f"For {load.tokens_per_s:,g} completion tokens/s, "
    if load.prompt_tokens is None:
        return "With "
    rate = "requests" if load.requests_per_s is None else f"{load.requests_per_s:,g} requests/s"
    return f"For {rate} of {load.prompt_tokens:,} + {load.completion_tokens:,} tokens, "


def _counted(weights: Weights) -> str:
    stored = weights.stored_parameters
    if stored is None:
        return "computed from config.json"
    if stored == weights.parameters:
        return "as in the files' headers"
    return f"{stored:,} in the files' headers"


def _slots(sizing: Sizing) -> str:
    slots = list(chain(*sizing.head_slots))
    if len(set(slots)) == 1:
        return f"{slots[0]:,} slots"
    return f"{min(slots):,} to {max(slots):,} slots"


def _dtype(sizing: Sizing) -> str:
    return dtypes.name(sizing.spec.dtype)


def _pace(pace: Pace | None) -> dict[str, Any] | None:
    return None if pace is None else {**asdict(pace), "tokens_per_s": pace.tokens_per_s}


def _bytes(label: str, nbytes: int, note: str) -> str:
    return f"  {label:<12}{nbytes:>19,}{binary(nbytes):>13}  {note}"


def _row(label: str, *cells: str) -> str:
    return f"{label:<28}" + "".join(f"{cell:>18}" for cell in cells)
