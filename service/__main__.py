"""The command line: `python -m service` serves.

Owns the flags and how failures are told: one line on stderr, exit code 2 for what the user can
mend. Knows nothing of gRPC.
"""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from pydantic import ValidationError

from a2sf.errors import A2SFError
from a2sf.schema import first_problem
from service.options import DEFAULT_BUDGET, ServerOptions
from service.runner import EngineCrashed
from service.server import run

DEFAULTS = ServerOptions()

app = typer.Typer(
    help="Serve completions over gRPC with a KV cache of constant size.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

LogLevel = Literal["debug", "info", "warning", "error"]


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(help="`reference`, a directory, or a Hugging Face hub id.")
    ] = DEFAULTS.model,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit, for a hub id.")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="Directory of alpha tables (*.json) to serve.")
    ] = None,
    default_table: Annotated[
        str | None,
        typer.Option(
            help="Table of requests that name no method; without one: preset h2o. Where it deals "
            "slots unequally among layers, so do all rows."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = DEFAULTS.host,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = DEFAULTS.port,
    insecure_bind: Annotated[
        bool, typer.Option("--insecure-bind", help="Allow plain text beyond this machine.")
    ] = False,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Requests that decode together.")
    ] = DEFAULTS.max_batch,
    slots: Annotated[
        int,
        typer.Option(
            min=1,
            help="Slots of a row, the mean over layers: the largest budget of a request, in "
            "tokens. Where --default-table deals them unequally, requests with the same in every "
            "layer get at most those of the narrowest.",
        ),
    ] = DEFAULTS.slots,
    default_budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Budget of requests that name none, in tokens; {DEFAULT_BUDGET} without it, or "
            "the slots of the narrowest layer where those are fewer.",
        ),
    ] = None,
    max_prefill_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt block, in tokens.")
    ] = None,
    step_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens computed between two decode steps.")
    ] = DEFAULTS.step_tokens,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait for a row.")
    ] = DEFAULTS.max_waiting,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Processor threads; default: those it may use.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = DEFAULTS.device,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.")
    ] = DEFAULTS.dtype,
    port_file: Annotated[
        Path | None, typer.Option(help="File that gets the port once the server serves.")
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get at shutdown.")
    ] = DEFAULTS.grace_s,
    log_level: Annotated[LogLevel, typer.Option(help="How much is logged, to stderr.")] = "info",
) -> None:
    """Serve a model until told to stop by SIGTERM or Ctrl-C."""
    logging.basicConfig(
        level=log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    try:
        options = ServerOptions(
            model=model,
            revision=revision,
            tables=tables,
            default_table=default_table,
            host=host,
            port=port,
            insecure_bind=insecure_bind,
            max_batch=max_batch,
            slots=slots,
            default_budget=default_budget,
            max_prefill_tokens=max_prefill_tokens,
            step_tokens=step_tokens,
            max_waiting=max_waiting,
            threads=threads,
            device=device,
            dtype=dtype,
            port_file=port_file,
            grace_s=grace,
        )
        code = asyncio.run(run(options, announce=_announce))
    except ValidationError as error:
        _fail(first_problem(error))
    except A2SFError as error:
        _fail(str(error))
    except EngineCrashed as error:
        # Ours to mend, not the user's; the cause is in the log.
        _fail(str(error), code=1)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line; `serve` may be said or left out."""
    arguments = sys.argv[1:]
    app(arguments[1:] if arguments[:1] == ["serve"] else arguments, prog_name="a2sf-serve")


def _announce(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
