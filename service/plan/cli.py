"""The command line of `plan`.

Owns the flags and their help. Knows nothing of the arithmetic behind them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from a2sf.engine.config import DEFAULT_MAX_PREFILL_TOKENS
from a2sf.errors import InvalidArgument
from a2sf.model.locate import REFERENCE
from service.plan import devices, units

PROGRAM = "a2sf-serve plan"

DEFAULT_RESERVE = "10%"
DEFAULT_UTILISATION = 0.7

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _panel(title: str) -> Any:
    def option(*names: str, **settings: Any) -> Any:
        return typer.Option(*names, rich_help_panel=title, **settings)

    return option


_model = _panel("Model, as for serve")
_cache = _panel("Cache")
_device = _panel("Device")
_measured = _panel("Measured times, instead of bounds")
_load = _panel("Load and price")
_output = _panel("Output")


@app.command()
def plan(
    *,
    model: Annotated[
        str,
        _model(
            help="`reference`, a directory (config.json is enough), a GGUF file, or a Hugging Face "
            "hub id."
        ),
    ] = REFERENCE,
    revision: Annotated[str | None, _model(help="Branch, tag or commit, for a hub id.")] = None,
    device: Annotated[
        str, _model(help="cuda or cpu: the device of the server; this machine need not have it.")
    ] = "cuda",
    dtype: Annotated[
        str, _model(help="As for the server; auto on cpu depends on this machine.")
    ] = "auto",
    tables: Annotated[
        Path | None, _model(metavar="PATH", help="Directory of alpha tables (*.json).")
    ] = None,
    default_table: Annotated[
        str | None,
        _model(
            help="Table for requests that name no method; it may split slots unequally among heads."
        ),
    ] = None,
    budget: Annotated[
        int,
        _cache(
            metavar="N",
            help="Tokens that each head keeps of a sequence, averaged over heads. It becomes "
            "--slots, and --default-budget if heads are equal.",
        ),
    ],
    slots: Annotated[
        int | None,
        _cache(
            metavar="N",
            min=1,
            help="Slots per head of a row, if requests may set a larger budget than --budget. "
            "[default: the budget]",
        ),
    ] = None,
    min_budget: Annotated[
        int | None,
        _cache(metavar="N", min=0, help="As for the server: lower bound of a ratio, in tokens."),
    ] = None,
    max_batch: Annotated[
        int | None,
        _cache(
            metavar="N", min=1, help="Sequences that decode together. [default: as many as fit]"
        ),
    ] = None,
    max_prefill_tokens: Annotated[
        int | None,
        _cache(
            metavar="N",
            min=1,
            help="Longest prompt block. [default: the model's context, at most "
            f"{DEFAULT_MAX_PREFILL_TOKENS}]",
        ),
    ] = None,
    context: Annotated[
        int | None,
        _cache(
            metavar="N",
            min=1,
            help="Tokens of a sequence in the full cache that the plan compares with. [default: "
            "--prompt-tokens + --completion-tokens; without them the model's context, at most 8192 "
            "or the budget]",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        _device(
            metavar="NAME",
            help=f"{', '.join(devices.GPUS)}: use its published memory, bandwidth and compute, "
            "unless the next three options give others.",
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None, _device(metavar="SIZE", help="Memory of the device: 80GB or 80GiB.")
    ] = None,
    bandwidth: Annotated[
        str | None, _device(metavar="RATE", help="Memory bandwidth: 4.8TB/s.")
    ] = None,
    compute: Annotated[
        str | None, _device(metavar="RATE", help="Compute of the processor: 989TFLOP/s.")
    ] = None,
    reserve: Annotated[
        str,
        _device(
            metavar="SIZE",
            help="Memory for everything except weights and cache: the driver's context, the "
            "allocator, activations and logits, the kernels' scratch, CUDA graphs. A size or a "
            "percentage of the memory. The default is a convention, not a measurement: look at "
            "the memory of a running server, and give that.",
        ),
    ] = DEFAULT_RESERVE,
    step_ms: Annotated[
        float | None,
        _measured(
            metavar="MS",
            help="Milliseconds of a decode step of --max-batch sequences; needs --max-batch.",
        ),
    ] = None,
    prefill_tokens_per_s: Annotated[
        float | None, _measured(metavar="N", help="Prompt tokens per second while nothing decodes.")
    ] = None,
    requests_per_s: Annotated[
        float | None, _load(metavar="N", help="Requests per second to serve.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, _load(metavar="N", min=1, help="Prompt tokens of a request, on average.")
    ] = None,
    completion_tokens: Annotated[
        int | None, _load(metavar="N", min=1, help="Completion tokens of a request, on average.")
    ] = None,
    tokens_per_s: Annotated[
        float | None,
        _load(metavar="N", help="Completion tokens per second to serve, instead of requests."),
    ] = None,
    utilisation: Annotated[
        float,
        _load(metavar="SHARE", help="Share of time that a replica is busy; the rest is headroom."),
    ] = DEFAULT_UTILISATION,
    price_per_hour: Annotated[
        float | None, _load(metavar="PRICE", help="Price of one replica per hour, in any currency.")
    ] = None,
    as_json: Annotated[
        bool, _output("--json", help="Print one JSON object, with plain numbers.")
    ] = False,
) -> None:
    """Compute the memory, speed and cost of a server, and print the command line that starts it.

    Memory is exact: the weight tensors, the staging row and the slab are what the server allocates,
    byte for byte, on the device of --device. On a CPU in float32 or bfloat16, an LM head that is
    tied to the embedding is stored twice, and counted twice. Memory that the CPU's matrix library
    adds per weight is not counted. Times are bounds from published figures unless --step-ms gives a
    measured one. One device holds the whole model. Nothing is loaded: the command reads config.json
    and, if present, the headers of the weight files, but no environment variables and no settings
    files.
    """
    from service.plan import pace, report, sizing

    for name, value in (
        ("--step-ms", step_ms),
        ("--prefill-tokens-per-s", prefill_tokens_per_s),
        ("--requests-per-s", requests_per_s),
        ("--tokens-per-s", tokens_per_s),
        ("--price-per-hour", price_per_hour),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise InvalidArgument(name, f"{value:g}; accepted: more than 0")
    if not 0 < utilisation <= 1:
        raise InvalidArgument("--utilisation", f"{utilisation:g}; accepted: above 0, at most 1")
    if step_ms is not None and max_batch is None:
        raise InvalidArgument("--step-ms", "needs --max-batch, the batch that it was measured at")
    known = devices.gpu(gpu)
    if gpu_memory is not None:
        known = replace(known, memory=units.parse_size("--gpu-memory", gpu_memory))
    if bandwidth is not None:
        known = replace(known, bandwidth=units.parse_bandwidth("--bandwidth", bandwidth))
    if compute is not None:
        known = replace(known, compute=units.parse_compute("--compute", compute))
    sources = pace.TimeSources(
        bandwidth=known.bandwidth,
        compute=known.compute,
        step_s=None if step_ms is None else step_ms / 1e3,
        prefill_tokens_per_s=prefill_tokens_per_s,
    )
    load = pace.Workload(
        requests_per_s=requests_per_s,
        tokens_per_s=tokens_per_s,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        utilisation=utilisation,
        price_per_hour=price_per_hour,
    )
    pace.check(sources, load)
    sized = sizing.size(
        sizing.PlanInputs(
            model=model,
            revision=revision,
            device=device,
            dtype=dtype,
            tables=tables,
            default_table=default_table,
            budget=budget,
            slots=slots,
            min_budget=min_budget,
            max_batch=max_batch,
            max_prefill_tokens=max_prefill_tokens,
            memory=known.memory,
            reserve=reserve,
            context=context,
            request_tokens=(
                prompt_tokens + completion_tokens if prompt_tokens and completion_tokens else None
            ),
        )
    )
    pace.check_lengths(sized, load)
    planned = report.Plan(
        sizing=sized,
        sources=sources,
        load=load,
        reserve_said=reserve,
        this_cache=pace.this_cache(sized, sources, load),
        full_cache=pace.full_cache(sized, sources, load),
    )
    show = report.as_json if as_json else report.as_text
    print(show(planned))


def run(arguments: Sequence[str]) -> None:
    """Print the plan and exit. Raises A2SFError for invalid arguments."""
    app(args=list(arguments), prog_name=PROGRAM)
