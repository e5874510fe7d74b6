"""The commands that measure policies: `evaluate` and `budget`.

`evaluate` compares several policies; `budget` finds the smallest budget of one. Owns their flags.
Knows nothing of how anything is measured.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from a2sf.errors import InvalidArgument, did_you_mean
from a2sf.tablefile import write_whole
from tuner.options import (
    DEFAULT_RATIO,
    DataDirOption,
    DeviceOption,
    DtypeOption,
    LengthOption,
    ModelOption,
    RevisionOption,
    check_ranges,
    check_writable,
    numbers,
    share,
    without_paths,
)

SPLITS = ("validation", "calibration")

ExamplesOption = Annotated[int, typer.Option(help="Sequences from each dataset.")]
SplitOption = Annotated[str, typer.Option(help="validation or calibration.")]
SeedOption = Annotated[
    int, typer.Option(help="Seed of the choice of examples and of the resampling.")
]
JsonOption = Annotated[Path | None, typer.Option(help="Write all figures to this file.")]


def evaluate(
    dataset: Annotated[str, typer.Option(help="As for fit; several with commas between them.")],
    policies: Annotated[
        str,
        typer.Option(
            help="With commas between them: full; window or h2o[:SINKS]; tova_per_head, random, "
            "a2sf:ALPHA, pyramid[:ALPHA] or adakv[:ALPHA], each with [:RECENT[:SINKS]]; a2sf for "
            "several of them; the file or shipped name of an alpha table. RECENT is the share (.5) "
            "of a head's slots, minus the sinks, that always holds the newest tokens, or their "
            "number (8); default .5, but 0 for tova_per_head. ALPHA is 1 and SINKS 4 by default."
        ),
    ] = "full,window,h2o,tova_per_head,random,a2sf",
    ratios: Annotated[
        str | None,
        typer.Option(
            help=f"Budgets as shares of each length, as in .1,.2,.4. Default: {DEFAULT_RATIO}."
        ),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(help="Budgets in tokens, as in 32,64; instead of or with --ratios."),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            help="Ask one question at a time, after this many solved ones, as in 0 or 0,1. "
            "Default: questions are packed into sequences of --length."
        ),
    ] = None,
    model: ModelOption = "reference",
    revision: RevisionOption = None,
    data_dir: DataDirOption = None,
    examples: ExamplesOption = 64,
    length: LengthOption = 512,
    split: SplitOption = "validation",
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            help="Tokens of one prompt block, except for tables; 0 means the whole prompt. "
            "Default: 0; with --shots 1 (step by step, as in the A2SF paper)."
        ),
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
    html: Annotated[Path | None, typer.Option(help="Write a report to this file.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Compare policies with the full cache: KL, likelihood, agreement, accuracy, attention kept."""
    _check(examples, length, seed, prefill_chunk, split)
    if ratios is None and slots is None:
        ratios = f"{DEFAULT_RATIO}"
    shares = numbers("--ratios", ratios, "numbers above 0 and below 1", lambda x: 0 < x < 1)
    tokens = numbers("--slots", slots, "whole numbers from 1", lambda x: x >= 1 and x % 1 == 0)
    before = numbers("--shots", shots, "whole numbers from 0", lambda x: x >= 0 and x % 1 == 0)
    for option, path in (("--json", json), ("--html", html)):
        if path is not None:
            check_writable(path, option)

    # The imports below take seconds; the flags above are checked without them.
    from tuner import evaluate as evaluation
    from tuner.evaluation.results import Size
    from tuner.report.terminal import print_evaluation

    sizes = [Size(ratio=x) for x in shares] + [Size(slots=int(x)) for x in tokens]
    found = evaluation.evaluate(
        evaluation.EvaluationSettings(
            dataset=dataset,
            policies=policies,
            sizes=tuple(sizes),
            shots=tuple(int(x) for x in before) or (None,),
            examples=examples,
            length=length,
            split=split,
            prefill_chunk=prefill_chunk,
            seed=seed,
            data_dir=data_dir,
            model=model,
            revision=revision,
            device=device,
            dtype=dtype,
            command=without_paths(sys.argv[1:]),
        )
    )
    print_evaluation(Console(), found)
    if json is not None:
        write_whole(json, found.model_dump_json(indent=1) + "\n")
        print(f"Wrote {json}.")
    if html is not None:
        from tuner.report.evaluation_page import render

        write_whole(html, render(found))
        print(f"Wrote {html}.")


def budget(
    policy: Annotated[
        str,
        typer.Argument(
            metavar="POLICY",
            help="The file or shipped name of an alpha table, or a policy in the form of evaluate: "
            "h2o, a2sf:.99:.25.",
        ),
    ],
    dataset: Annotated[str, typer.Option(help="As for fit, but only one.")],
    within: Annotated[
        str,
        typer.Option(
            help="Largest accepted increase of perplexity over the full cache, as in 1% or .01. "
            "The upper limit of its 95 % interval decides."
        ),
    ] = "1%",
    up_to: Annotated[
        float, typer.Option(help="Largest budget to consider, as a share of the length.")
    ] = 1.0,
    model: ModelOption = "reference",
    revision: RevisionOption = None,
    data_dir: DataDirOption = None,
    examples: ExamplesOption = 64,
    length: LengthOption = 512,
    split: SplitOption = "validation",
    prefill_chunk: Annotated[
        int,
        typer.Option(
            help="Tokens of one prompt block, except for a table; 0 means the whole prompt."
        ),
    ] = 0,
    seed: SeedOption = 0,
    json: JsonOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Find the smallest budget of a table or policy that stays near the full cache.

    Bisects over budgets in steps of .01 of the length. Nearness is measured in perplexity, with an
    interval of paired differences on the same examples; KL is printed beside it.
    """
    _check(examples, length, seed, prefill_chunk, split)
    max_increase = share("--within", within)
    if not 0.01 <= up_to <= 1:
        raise InvalidArgument("--up-to", f"{up_to:g}; accepted: .01 to 1")
    if json is not None:
        check_writable(json, "--json")

    # The imports below take seconds; the flags above are checked without them.
    from tuner import budget as budgets
    from tuner.report.budget_answer import lines

    found = budgets.search(
        budgets.BudgetSettings(
            dataset=dataset,
            policy=policy,
            within=max_increase,
            up_to=up_to,
            examples=examples,
            length=length,
            split=split,
            prefill_chunk=prefill_chunk,
            seed=seed,
            data_dir=data_dir,
            model=model,
            revision=revision,
            device=device,
            dtype=dtype,
            command=without_paths(sys.argv[1:]),
        )
    )
    for line in lines(found):
        print(line)
    if json is not None:
        write_whole(json, found.model_dump_json(indent=1) + "\n")
        print(f"Wrote {json}.")


def _check(examples: int, length: int, seed: int, prefill_chunk: int | None, split: str) -> None:
    check_ranges(
        {
            "examples": (examples, 2, None),
            "length": (length, 32, None),
            "seed": (seed, 0, 2**31 - 1),
            "prefill-chunk": (prefill_chunk, 0, None),
        }
    )
    if split not in SPLITS:
        near = did_you_mean(split, SPLITS)
        raise InvalidArgument("--split", f"{split!r}; accepted: {', '.join(SPLITS)}{near}")
