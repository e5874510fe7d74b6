"""Shared parts of all commands: options, checks that load nothing, table names, failures.

The checks need nothing loaded, so a mistake is reported at once. Owns the wording of errors. Knows
nothing of which commands there are.
"""

import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from a2sf import reference
from a2sf.errors import InvalidArgument, NotFound, did_you_mean

DEFAULT_RATIO = 0.2

ModelOption = Annotated[
    str, typer.Option(help="`reference`, a directory, a GGUF file, or a Hugging Face hub id.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit, for a hub id.")]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Directory of the public datasets and your folders: DIR/NAME/calibration.jsonl and "
        "validation.jsonl, or .txt. Default: $A2SF_DATA_DIR."
    ),
]
LengthOption = Annotated[int, typer.Option(help="Largest number of tokens of one sequence.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    str, typer.Option(help="auto (as for the server), float32, bfloat16 or float16.")
]
TableArgument = Annotated[
    str,
    typer.Argument(metavar="TABLE", help="The file of a table, or the name of a shipped table."),
]


def check_ranges(values: dict[str, tuple[int | None, int, int | None]]) -> None:
    """Raise InvalidArgument for a value outside [low, high]; None is no value, or no limit."""
    for name, (value, low, high) in values.items():
        if value is not None and (value < low or (high is not None and value > high)):
            accepted = f"{low} or more" if high is None else f"{low} to {high}"
            raise InvalidArgument(f"--{name}", f"{value}; accepted: {accepted}")


def check_writable(out: Path, option: str = "--out") -> None:
    """Make the directory of an output file, and check that it is writable.

    Raises InvalidArgument, naming the option, if it is not.
    """
    if out.is_dir():
        raise InvalidArgument(option, f"{out} is a directory; give a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The only reliable check: permissions do not show that a file system is read-only or full.
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InvalidArgument(
            option, f"{out} cannot be written ({error.strerror}); give a file in another directory"
        ) from None


def shipped_tables() -> dict[str, Path]:
    """The files of the tables in the package, by name."""
    return {path.stem: path for path in sorted((reference.path() / "tables").glob("*.json"))}


def table_file(written: str, option: str = "") -> Path:
    """Return the file for a path or for the name of a shipped table.

    Raises NotFound, whose message begins with the option, if there is no such file.
    """
    path, shipped = Path(written), shipped_tables()
    if path.is_file():
        return path
    if written in shipped:
        return shipped[written]
    near = did_you_mean(written, shipped)
    raise NotFound(
        f"{f'{option}: ' if option else ''}alpha table {written}: there is no such file, and none "
        f"is shipped under this name; shipped: {', '.join(shipped)}{near}"
    )


def numbers(
    option: str, written: str | None, accepted: str, fits: Callable[[float], bool]
) -> list[float]:
    """Read numbers with commas between them, in the order given.

    Raises InvalidArgument with `accepted` for a number that does not fit or is given twice.
    """
    values: list[float] = []
    for one in (written or "").split(","):
        if not one.strip():
            continue
        try:
            value = float(one)
        except ValueError:
            value = math.nan
        if not fits(value) or value in values:
            raise InvalidArgument(
                option, f"{one.strip()!r}; accepted: {accepted}, each once, comma between them"
            )
        values.append(value)
    return values


def share(option: str, written: str) -> float:
    """Read a share above 0 and below 1, which may be written in percent.

    Raises InvalidArgument for anything else; 1 without a percent sign is ambiguous.
    """
    number, sign, rest = written.strip().partition("%")
    try:
        value = float(number) / (100 if sign else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1 or rest:
        raise InvalidArgument(
            option, f"{written!r}; accepted: percent such as 1%, or a share below 1 such as .01"
        )
    return value


def table_name(dataset: str) -> str:
    """Derive a table's name from the dataset: the name of the file or folder, with its suffix.

    Several datasets give all their names. A dash replaces characters that are not accepted in
    names.
    """
    names = (Path(name.strip()).name for name in dataset.split(","))
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(names))[:80].strip("-._") or "table"


def without_paths(arguments: Sequence[str]) -> str:
    """The given command line, without the directories of paths."""
    words = (Path(word).name if os.sep in word else word for word in arguments)
    return shlex.join(["python", "-m", "tuner", *words])


def fail(message: str, code: int = 2) -> NoReturn:
    """Print an error in one line on standard error, and exit."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
