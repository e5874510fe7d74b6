"""The commands `fit`, `tables` and `report`: fit a table, and show the results.

The commands that measure policies are in `tuner.measuring`. Owns the flags of `fit` and how
failures are reported: one line on stderr, with exit code 2 for errors that the user can correct and
69 (EX_UNAVAILABLE) if a storage is unavailable. Knows nothing of how a table is found.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from a2sf.errors import A2SFError, InvalidArgument, Unavailable, did_you_mean
from a2sf.tablefile import load_table, save_table, write_whole
from tuner.measuring import budget, evaluate
from tuner.options import (
    DEFAULT_RATIO,
    DataDirOption,
    DeviceOption,
    DtypeOption,
    LengthOption,
    ModelOption,
    RevisionOption,
    TableArgument,
    check_ranges,
    check_writable,
    fail,
    table_file,
    table_name,
)
from tuner.settings import DEFAULT_STAGES, STAGES, FitSettings, bare_name

DEFAULT_MINUTES, REFERENCE_MINUTES = 30, 8
"""Enough on two cores for a model of 135 million parameters, and for the packaged model."""

app = typer.Typer(
    help="Fit tables of forgetting factors, prove them, and compare cache policies. Options "
    "without a command mean fit: python -m tuner --dataset recall",
    no_args_is_help=True,
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
            help="recall, state, arith or copy, which are generated and need no data; a public "
            "set such as mathqa, from --data-dir; a folder or file of rows (.jsonl) or text; or a "
            "dataset repository on the Hugging Face hub. Several, with commas, to fit their "
            "mixture. docs/tuner.md has the forms of rows."
        ),
    ],
    model: ModelOption = "reference",
    revision: RevisionOption = None,
    budget: Annotated[int | None, typer.Option(help="Mean slots of a head, in tokens.")] = None,
    budget_ratio: Annotated[
        float | None,
        typer.Option(help=f"Mean slots as a share of the length; default {DEFAULT_RATIO}."),
    ] = None,
    data_dir: DataDirOption = None,
    stages: Annotated[
        str | None,
        typer.Option(help="Stages of the search, in order, with commas between them; see above."),
    ] = None,
    trials: Annotated[
        int,
        typer.Option(
            help="Largest number of settings to measure, over all stages, runs and workers. Up to "
            "half of them go to the best uniform setting, from which the other stages start."
        ),
    ] = 1000,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Largest time of all measurements, with the proof, summed over workers; the time "
            "to load the model is not counted. Up to a third is kept for the proof, which uses "
            "fewer held-out examples if the time is short. 0 means no limit. Default: "
            f"{DEFAULT_MINUTES}, and {REFERENCE_MINUTES} for the packaged model."
        ),
    ] = None,
    examples: Annotated[int, typer.Option(help="Calibration sequences for the search.")] = 16,
    holdout: Annotated[
        int | None,
        typer.Option(help="Validation sequences for the proof. Default: twice --examples."),
    ] = None,
    length: LengthOption = 512,
    seed: Annotated[
        int, typer.Option(help="Seed of the choice of examples and of random draws.")
    ] = 0,
    storage: Annotated[
        str | None, typer.Option(help="Database URL. Default: a journal file beside --out.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study. Default: --name.")] = None,
    prefill_chunk: Annotated[
        int, typer.Option(help="Tokens of one prompt block; 0 means the whole prompt.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the table. Default: in tables/, with a name from the data and budget."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the table. Default: from --out.")
    ] = None,
    keep_table: Annotated[
        bool, typer.Option("--keep-table", help="Write the fitted table even if it is not better.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Search for a table, compare it with the best uniform alpha on held-out data, and write it.

    Each stage starts from the best setting so far. sensitivity splits the slots among all heads by
    the measured cost of fewer slots in each head alone; alphas chooses each head's alpha by the
    same measurements; protection chooses the recent window and the sinks; polish takes small steps
    in all of these. Further stages, for comparison: slots splits the slots among layers by trial;
    layers and heads try alphas; tpe and cma search all alphas, or the layers, as a whole. Without
    --stages: sensitivity, alphas, protection, polish. A table whose heads have unequal slots needs
    a server with rows of the same shape; leave out sensitivity and slots for a table that any
    server accepts.
    """
    check_ranges(
        {
            "budget": (budget, 1, None),
            "trials": (trials, 1, None),
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
        out = Path("tables") / f"{table_name(dataset)}-{size}.json"
    name = bare_name(out) if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InvalidArgument(
            "--name", f"{name!r}; accepted: up to 100 letters, digits, dots, dashes, underscores"
        )
    if minutes is None:
        minutes = REFERENCE_MINUTES if model == "reference" else DEFAULT_MINUTES
    if not 0 <= minutes < math.inf:
        raise InvalidArgument("--minutes", f"{minutes:g}; accepted: above 0, or 0 for no limit")
    chosen = DEFAULT_STAGES if stages is None else tuple(s.strip() for s in stages.split(",") if s)
    for stage in chosen:
        if stage not in STAGES or chosen.count(stage) > 1:
            raise InvalidArgument(
                "--stages",
                f"{stage!r}; accepted: {', '.join(STAGES)}, each at most once"
                + ("" if stage in STAGES else did_you_mean(stage, STAGES)),
            )
    check_writable(out)

    # The imports below take seconds; the flags above are checked without them.
    from tuner.fit import fit as run_fit
    from tuner.report.terminal import print_outcome

    settings = FitSettings(
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
        stages=chosen,
        trials=trials,
        minutes=minutes or None,
        examples=examples,
        holdout=holdout,
        length=length,
        seed=seed,
        storage=storage,
        device=device,
        dtype=dtype,
        keep_table=keep_table,
    )
    outcome = run_fit(settings)
    save_table(outcome.table, out)
    where = "in the given storage" if storage else f"in {settings.journal}"
    kept = f"{study or name!r} {where}"
    print_outcome(Console(), outcome, model=model, out=out, study_kept=kept)


app.command()(evaluate)
app.command()(budget)


@app.command()
def report(
    file: TableArgument,
    html: Annotated[Path, typer.Option(help="Write the report to this file.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="File of evaluate --json, with this table among its policies: adds curves of "
            "quality over budgets."
        ),
    ] = None,
) -> None:
    """Write an HTML report of a table; `tables show` prints the same figures."""
    table = load_table(table_file(file))
    check_writable(html, "--html")

    # The imports below take seconds; the table is checked without them.
    from tuner.report.table_page import load_evaluation, render

    found = load_evaluation(evaluation, table) if evaluation is not None else None
    write_whole(html, render(table, found))
    print(f"Wrote {html}.")


@tables.command("show")
def show(file: TableArgument) -> None:
    """Print a table: policy, provenance, evidence with intervals, verdict, alphas."""
    from tuner.report.terminal import show as print_table

    print_table(Console(), load_table(table_file(file)))


def run(arguments: Sequence[str]) -> None:
    """Run a command and exit."""
    try:
        app(list(arguments), prog_name="a2sf-tune")
    except A2SFError as error:
        # A temporary failure, such as an unavailable database, has a code that means "try again".
        fail(str(error), os.EX_UNAVAILABLE if isinstance(error, Unavailable) else 2)
