"""Finds data sets by name.

Owns the names of the known data sets, and the places that are searched. Knows nothing of tokens or
models; `packing` does.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import huggingface_hub

from a2sf.errors import InvalidArgument, NotFound, did_you_mean
from tuner.data import generated
from tuner.data.generated import RECALL_FORMS, STATE_FORMS
from tuner.data.parts import SPLITS, Dataset, Group, Part, from_single_file, from_two_files
from tuner.data.rows import (
    ROW_FORMS,
    ROW_SUFFIXES,
    Turn,
)

DATA_DIR_VARIABLE = "A2SF_DATA_DIR"

FILE_SUFFIXES = (".jsonl", ".txt")
"""Formats of `calibration` and `validation`: rows, or plain UTF-8 text."""


@dataclass(frozen=True)
class PublishedDataset:
    """A public dataset, read from the data directory; `origin` is its repository on the hub."""

    origin: str


@dataclass(frozen=True)
class GeneratedDataset:
    """A dataset made by a generator. Each example is one context with several questions."""

    episode: Callable[..., generated.Episode]
    max_facts: int = 120
    questions: int = 8


REGISTRY: dict[str, PublishedDataset | GeneratedDataset] = {
    "mathqa": PublishedDataset("allenai/math_qa"),
    "openbookqa": PublishedDataset("allenai/openbookqa"),
    "winogrande": PublishedDataset("allenai/winogrande"),
    "piqa": PublishedDataset("ybisk/piqa"),
    "copa": PublishedDataset("aps/super_glue"),
    "arc_easy": PublishedDataset("allenai/ai2_arc"),
    "arc_challenge": PublishedDataset("allenai/ai2_arc"),
    "gsm8k": PublishedDataset("openai/gsm8k"),
    "wikitext2": PublishedDataset("Salesforce/wikitext"),
    "recall": GeneratedDataset(generated.recall_episode, questions=16),
    "state": GeneratedDataset(generated.state_episode),
    "arith": GeneratedDataset(generated.arith_episode),
    "copy": GeneratedDataset(generated.copy_episode, questions=1),
    **{
        f"recall_{form}": GeneratedDataset(partial(generated.recall_episode, form=form))
        for form in RECALL_FORMS
        if form != "talk"
    },
    **{
        f"state_{f}": GeneratedDataset(partial(generated.state_episode, form=f))
        for f in STATE_FORMS
    },
}
"""One line per dataset. A folder in the data directory is found by its name without an entry
here."""


def load(name: str, data_dir: Path | None) -> Dataset:
    """Find and read the dataset `name`: a known name, a folder or file, or a repository on the hub.

    The order of the search: generated datasets; `data_dir`/`name`; `name` as a path; and, if it has
    the form owner/repository, a dataset repository on the hub with the same files as a folder.
    Raises NotFound, which lists the places searched and the remedy, or InvalidArgument.
    """
    entry = REGISTRY.get(name)
    if isinstance(entry, GeneratedDataset):
        description = f"{name} is generated; no question of calibration is in validation"
        return Dataset(
            name,
            _generated_part(entry, "calibration"),
            _generated_part(entry, "validation"),
            description,
        )
    searched = []
    if data_dir is not None:
        searched.append(f"{data_dir / name}")
        if name and (data_dir / name).is_dir():
            return _folder(name, data_dir / name)
    path = Path(name)
    searched.append(f"{path} as a path")
    if name and path.is_dir():
        return _folder(path.resolve().name, path)
    if path.is_file():
        return from_single_file(path)
    # A name with a file's suffix is a missing file, not a repository.
    file = path.suffix.lower() in (*ROW_SUFFIXES, *FILE_SUFFIXES)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not file:
        return _hub(name, searched)
    raise NotFound(
        f"dataset {name!r} not found{_not_found_advice(name, entry, data_dir, searched)}"
    )


def load_all(names: str, data_dir: Path | None) -> list[Dataset]:
    """Read one dataset, or several with commas between their names.

    Raises as `load` does, and InvalidArgument if one is named twice.
    """
    if Path(names).is_file():  # the file's own name may contain a comma
        return [load(names, data_dir)]
    each = [name.strip() for name in names.split(",") if name.strip()] or [names]
    found = [load(name, data_dir) for name in each]
    for name in (dataset.name for dataset in found):
        if [dataset.name for dataset in found].count(name) > 1:
            raise InvalidArgument("dataset", f"{name!r} is given twice")
    return found


def data_directory(option: Path | None) -> Path | None:
    """Return the data directory: the option, else the environment variable."""
    if option is not None:
        if not option.is_dir():
            raise NotFound(f"--data-dir {option}: not a directory")
        return option
    value = os.environ.get(DATA_DIR_VARIABLE)
    return Path(value) if value else None


def _not_found_advice(
    name: str, entry: PublishedDataset | None, data_dir: Path | None, searched: list[str]
) -> str:
    where = "looked for " + " and ".join(searched)
    if data_dir is None:
        where += f" (neither --data-dir nor ${DATA_DIR_VARIABLE} is set)"
    if entry is None:
        others = [folder for folder in _folders(data_dir) if folder not in REGISTRY]
        return (
            f"{did_you_mean(name, [*REGISTRY, *others]) or '.'} Known names are "
            f"{', '.join(REGISTRY)}"
            + (f", and {', '.join(others)} in {data_dir}" if others else "")
            + f"; {where}; or give a .jsonl or text file"
        )
    return (
        f": {where}; the original is https://huggingface.co/datasets/{entry.origin}, whose files "
        f"are not read directly: store its rows as DIR/{name}/calibration.jsonl and "
        f"validation.jsonl (or .txt), one of {ROW_FORMS} a line, and give --data-dir DIR"
    )


def _folder(name: str, folder: Path) -> Dataset:
    files = {}
    for split in SPLITS:
        found = [folder / (split + suffix) for suffix in FILE_SUFFIXES]
        files[split] = next((path for path in found if path.is_file()), None)
        if files[split] is None:
            raise NotFound(
                f"dataset {name!r}: {folder} holds neither {found[0].name} nor {found[1].name}; "
                "other files are not read; put one there, with rows such as "
                f"{ROW_FORMS}, or give a single file as --dataset"
            )
    return from_two_files(name, files["calibration"], files["validation"])


def _hub(repository: str, searched: list[str]) -> Dataset:
    """Read a dataset repository that holds the same files as a folder."""
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            repo_type="dataset",
            allow_patterns=[split + suffix for split in SPLITS for suffix in FILE_SUFFIXES],
        )
    except (huggingface_hub.errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotFound(
            f"dataset {repository!r} not found: looked for {' and '.join(searched)}, and for that "
            f"dataset repository on the Hugging Face hub: {reason}"
        ) from error
    return _folder(repository, Path(folder))


def _folders(data_dir: Path | None) -> list[str]:
    """Names of the datasets in the data directory."""
    if data_dir is None:
        return []
    files = [split + suffix for split in SPLITS for suffix in FILE_SUFFIXES]
    return sorted({path.parent.name for file in files for path in data_dir.glob(f"*/{file}")})


def _generated_part(source: GeneratedDataset, split: str) -> Part:
    def group(rng: Random, facts: int) -> Group:
        episode = source.episode(rng, split=split, facts=facts, questions=source.questions)
        first, *rest = (Turn(question, answer) for question, answer in episode.turns)
        return (Turn(episode.context + first.question, first.answer), *rest)

    return Part(split, generate=group, max_facts=source.max_facts)
