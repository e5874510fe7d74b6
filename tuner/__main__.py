"""The command line: `python -m tuner` fits a table, `python -m tuner tables show` reads one.

Owns the flags, the checks that cost nothing, and how failures are told: one line on stderr, exit
code 2 for what the user can mend, 130 when interrupted. Knows nothing of how a table is found.
"""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from a2sf.errors import A2SFError, InvalidArgument, NotFound
from a2sf.schema import load_table, save_table

DEFAULT_RATIO = 0.2

COMMANDS = ("fit", "tables")

app = typer.Typer(
    help="Fit a table of forgetting factors to a model and a dataset, and prove it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
tables = typer.Typer(help="Look at tables.", no_args_is_help=True)
app.add_typer(tables, name="tables")


@app.command()
def fit(
    dataset: Annotated[
        str,
        typer.Option(
            help="A known name such as mathqa, a folder or file of rows or text, or a dataset "
            "repository on the Hugging Face hub."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="`reference`, a directory, or a Hugging Face hub id.")
    ] = "reference",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit, for a hub id.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Slots a head keeps, in tokens.")] = None,
    budget_ratio: Annotated[
        float | None,
        typer.Option(help=f"Slots as a share of the length; {DEFAULT_RATIO} without --budget."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where datasets are; else $A2SF_DATA_DIR.")
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Tables to try in all, over all runs and workers of the study.")
    ] = 30,
    examples: Annotated[int, typer.Option(help="Calibration sequences to search on.")] = 32,
    holdout: Annotated[
        int | None,
        typer.Option(help="Validation sequences to prove on; twice --examples by default."),
    ] = None,
    length: Annotated[int, typer.Option(help="Most tokens of one sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Decides examples and moves.")] = 0,
    storage: Annotated[
        str | None, typer.Option(help="Database URL; a journal file beside --out without it.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study; else --name.")] = None,
    prefill_chunk: Annotated[
        int, typer.Option(help="Tokens of one prompt block; 0 is the whole prompt.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the table goes.")] = None,
    name: Annotated[str | None, typer.Option(help="The table's name; else that of --out.")] = None,
    keep_table: Annotated[
        bool, typer.Option("--keep-table", help="Write the table even where uniform is as good.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Search for a table, compare it with the best uniform alpha on held-out data, write it."""
    _check_ranges(
        {
            "budget": (budget, 1, None),
            "trials": (trials, 0, None),
            "examples": (examples, 2, None),
            "holdout": (holdout, 2, None),
            "length": (length, 32, None),
            "seed": (seed, 0, 2**31 - 1),
            "prefill-chunk": (prefill_chunk, 0, None),
        }
    )
    if budget is not None and budget_ratio is not None:
        raise InvalidArgument("--budget", "give at most one of --budget and --budget-ratio")
    ratio = DEFAULT_RATIO if budget is None and budget_ratio is None else budget_ratio
    if ratio is not None and not 0 < ratio < 1:
        raise InvalidArgument("--budget-ratio", f"{ratio:g}; accepted: above 0 and below 1")
    if out is None:
        size = f"{ratio:g}" if budget is None else f"b{budget}"
        out = Path(f"{Path(dataset).stem or 'table'}-{size}.json")
    name = out.stem if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InvalidArgument(
            "--name", f"{name!r}; accepted: up to 100 letters, digits, dots, dashes, underscores"
        )
    _check_writable(out)

    # What follows needs seconds to import, and the flags above are checked without it.
    from tuner.fit import Settings
    from tuner.fit import fit as run
    from tuner.report import summarise

    try:
        outcome = run(
            Settings(
                dataset=dataset,
                out=out,
                name=name,
                study=study or name,
                model=model,
                revision=revision,
                budget=budget,
                budget_ratio=ratio,
                prefill_chunk=prefill_chunk,
                data_dir=data_dir,
                trials=trials,
                examples=examples,
                holdout=holdout,
                length=length,
                seed=seed,
                storage=storage,
                device=device,
                dtype=dtype,
                keep_table=keep_table,
            )
        )
    except KeyboardInterrupt:
        print("interrupted; the study is kept: run the same command to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    save_table(outcome.table, out)
    where = "in the given storage" if storage else f"in {out.with_suffix('.journal')}"
    kept = f"{study or name!r} {where}"
    summarise(Console(), outcome, model=model, out=out, study_kept=kept)


@tables.command("show")
def show(file: Annotated[Path, typer.Argument(help="A table's file.")]) -> None:
    """Print a table: policy, provenance, evidence with intervals, verdict, alphas."""
    from tuner.report import show as print_table

    print_table(Console(), load_table(file))


def main() -> None:
    """Run the command line; `fit` may be said or left out."""
    # The scan is many small operations. Threads that spin while they wait for each other cost
    # it a factor of eight on a machine that does anything else (measured, two cores); this only
    # helps where torch is not imported yet, so nothing above imports it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    if arguments[:1] not in (["--help"], *([command] for command in COMMANDS)):
        arguments = ["fit", *arguments]
    try:
        app(arguments, prog_name="a2sf-tune")
    except A2SFError as error:
        _fail(str(error))


def _check_ranges(values: dict[str, tuple[int | None, int, int | None]]) -> None:
    for name, (value, low, high) in values.items():
        if value is not None and (value < low or (high is not None and value > high)):
            accepted = f"{low} or more" if high is None else f"{low} to {high}"
            raise InvalidArgument(f"--{name}", f"{value}; accepted: {accepted}")


def _check_writable(out: Path) -> None:
    directory = out.parent
    if not directory.is_dir():
        raise NotFound(f"--out {out}: there is no directory {directory}; make it first")
    if out.is_dir():
        raise InvalidArgument("--out", f"{out} is a directory; give a file")
    if not os.access(directory, os.W_OK):
        raise InvalidArgument("--out", f"{directory} cannot be written to")


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
