"""Shows the product: questions about one text, with three caches side by side on a real server.

Owns the steps that `make demo` shows, the text and its questions. The model is SmolLM2, with the
table that was fitted for it on WikiText-2. If that model is not available, the packaged model is
used. All printed answers and memory figures come from the server.
"""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from a2sf.errors import A2SFError
from a2sf.policy import CachePolicy
from a2sf.requests import Sampling
from scripts.real_model import DIRECTORY, CannotFetch, real_model
from service.client import Client
from service.client.results import Completion
from tuner.data.generated import recall_episode

ROOT = Path(__file__).resolve().parents[1]

START_TIMEOUT_S = 300.0

_LINES = """
Calder Point is a fishing town on the northern coast. It was founded in 1683 by Elias Thornbury, a
captain whose ship, the Grey Heron, had been lost on the rocks below the cliff. For sixty years
the town had no light, and nine more ships went down in the bay. The lighthouse that still stands
there was built by Margaret Ashdown, the daughter of a mason, who carried the plans in her head
because she could not write. It is forty metres high and was painted red and white in 1802.

The harbour brought trade. Timber came from the east, salt from the south, and by the end of the
century the town had three thousand people, two churches and a school. A factory on the hill began
to make violin strings, which were sold as far away as Vienna. When the railway came, the factory
grew, and the old market was moved to the meadow behind the station. The great storm of that
winter tore the roof from the town hall, and it was seven years before the money for a new one was
found.

The library was a gift of Doctor Samuel Okafor, who had come as a ship's surgeon and stayed. He
gave the house, the books and his collection of maps, on the condition that nobody should ever pay
to read there. Each autumn the town holds a fair in his memory, with a race of rowing boats from
the pier to the island and back. The mayor opens it by ringing the bell of the Grey Heron, which
divers had found in the bay. Visitors come by train in the morning, eat smoked mackerel on the
quay, walk up to the cliff to see the sun go down, and leave again with the last train at night.
"""
TEXT = "\n\n".join(" ".join(part.split()) for part in _LINES.split("\n\n"))

SHOWN = (
    ("What sort of town is Calder Point?", "a fishing town on the northern coast"),
    ("How many ships were lost in the bay?", "nine more ships"),
)
"""Answered in the prompt, so that the model sees the form of an answer."""

ASKED = (
    ("Who built the lighthouse?", "Margaret Ashdown"),
    ("What does the factory on the hill make?", "violin strings"),
    ("Who gave the library to the town?", "Samuel Okafor"),
    ("What was the name of the ship that was lost on the rocks?", "Grey Heron"),
    ("What do visitors eat on the quay?", "smoked mackerel"),
    ("Where was the old market moved to?", "the meadow behind the station"),
)
"""Six questions that the model answers correctly with the full cache. Questions that it cannot
answer would test the model, not the cache."""


@dataclass(frozen=True)
class Subject:
    """A model, its questions, and the table that was fitted for it."""

    title: str
    model: str
    tables: str
    table: str
    budget: int
    """Tokens that the window and the table keep: a fifth of prompt and answer."""
    questions: tuple[tuple[str, str], ...]
    """Questions about the text, and the words that a right answer contains."""
    prompt: Callable[[str], str]
    max_new_tokens: int
    prefill_chunk: int
    ask: str
    """A suggestion for the reader's next prompt, as an argument of the client's command line."""


def real_subject() -> Subject:
    """SmolLM2 with questions about TEXT."""
    shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in SHOWN)
    return Subject(
        title="SmolLM2-135M-Instruct",
        model=str(DIRECTORY.relative_to(ROOT)),
        tables="benchmarks/tables/smollm2",
        table="smollm2-wikitext2",
        budget=86,
        questions=ASKED,
        prompt=lambda question: f"{TEXT}\n\n{shown}Question: {question}\nAnswer:",
        max_new_tokens=12,
        prefill_chunk=0,
        ask='--chat "Why is the sky blue?"',
    )


def reference_subject() -> Subject:
    """The packaged model, asked for numbers that its text states once."""
    episode = recall_episode(Random(0), split="validation", facts=40, questions=6)
    return Subject(
        title="the packaged reference model, which knows but few words",
        model="reference",
        tables="benchmarks/tables",
        table="recall",
        budget=102,
        questions=episode.turns,
        prompt=lambda question: episode.context + question,
        max_new_tokens=1,
        # Small, so that an answer of one token uses a cache from which tokens have been evicted.
        prefill_chunk=8,
        ask='"Once upon a time"',
    )


def caches(subject: Subject) -> dict[str, CachePolicy]:
    """The compared caches, by their names on the screen."""
    small = CachePolicy(budget=subject.budget, prefill_chunk=subject.prefill_chunk)
    return {
        "full cache": CachePolicy(preset="full"),
        "window": small.model_copy(update={"preset": "window"}),
        "fitted table": small.model_copy(update={"table": subject.table}),
    }


def chosen(console: Console, *, reference: bool) -> Subject:
    """Fetch the real model, or print why the packaged one replaces it."""
    if reference:
        return reference_subject()
    try:
        with _waiting(console, "looking for SmolLM2-135M-Instruct; fetching it takes 93 MB"):
            real_model()
    except (CannotFetch, A2SFError, OSError) as error:
        console.print(f"SmolLM2 cannot be had: {error}", markup=False)
        console.print("The packaged model takes its place.")
        return reference_subject()
    return real_subject()


def serve_command(subject: Subject) -> list[str]:
    """The command with which a reader starts the server of this demonstration."""
    sizes = ("--slots", "1024", "--max-batch", "4")
    return ["-m", "service", "--model", subject.model, "--tables", subject.tables, *sizes]


@contextlib.contextmanager
def serving(console: Console, subject: Subject) -> Iterator[str]:
    """Run a real server during the block; yield its address, and stop it as an operator would."""
    with tempfile.TemporaryDirectory() as name:
        port_file, told = Path(name) / "port", Path(name) / "output"
        with told.open("wb") as output:
            server = subprocess.Popen(
                [
                    *(sys.executable, *serve_command(subject), "--port", "0"),
                    *("--port-file", port_file, "--log-level", "warning"),
                ],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            with _waiting(console, "starting; the first start on a machine compiles, for a minute"):
                until = time.monotonic() + START_TIMEOUT_S
                while not port_file.exists():
                    if server.poll() is not None or time.monotonic() > until:
                        sys.exit(f"the server does not serve:\n{told.read_text()}")
                    time.sleep(0.1)
            yield f"127.0.0.1:{port_file.read_text().strip()}"
            server.send_signal(signal.SIGTERM)
            if server.wait(60) != 0:
                sys.exit(f"the server did not stop cleanly:\n{told.read_text()}")
        finally:
            server.kill()
            server.wait()


@contextlib.contextmanager
def _waiting(console: Console, what: str) -> Iterator[None]:
    """Report slow work while it runs: with a spinner on a terminal, otherwise in lines."""
    since = time.monotonic()
    if not console.is_terminal:
        console.print(f"  {what} ...")
    with console.status(what):
        yield
    console.print(f"  done after {time.monotonic() - since:.0f} s")


async def compare(console: Console, subject: Subject, address: str) -> dict[str, list[Completion]]:
    """Ask every question with every cache, and show the answers as they arrive."""
    compared = caches(subject)
    answers: dict[str, list[Completion]] = {name: [] for name in compared}
    async with Client(address) as client:
        for question, expected in subject.questions:
            console.print(Text(question.strip(), style="bold"))
            with console.status("answering under three caches at once"):
                # Requests with different policies decode in one batch.
                done = await asyncio.gather(
                    *(
                        client.generate(
                            subject.prompt(question),
                            max_new_tokens=subject.max_new_tokens,
                            sampling=Sampling(temperature=0.0),
                            stop=["\n"],
                            cache_policy=policy,
                        )
                        for policy in compared.values()
                    )
                )
            for name, completion in zip(compared, done, strict=True):
                answers[name].append(completion)
                good = is_right(completion.text, expected)
                line = Text(f"  {name:<18} ", style="dim")
                line.append("right  " if good else "wrong  ", style="green" if good else "red")
                line.append(" ".join(completion.text.split()), style="default")
                console.print(line)
    return answers


def is_right(text: str, expected: str) -> bool:
    """Whether an answer contains the expected words, as whole words."""
    return re.search(rf"\b{re.escape(expected.strip())}\b", text, re.IGNORECASE) is not None


def summary(subject: Subject, answers: dict[str, list[Completion]]) -> Table:
    """Show each cache's contents at its largest, and how many of its answers were right."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", "tokens kept", "of", "memory of keys and values", "right answers"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, completions in answers.items():
        widest = max(completions, key=lambda done: done.finished.cache.kv_bytes)
        cache = widest.finished.cache
        right = sum(
            is_right(done.text, expected)
            for done, (_, expected) in zip(completions, subject.questions, strict=True)
        )
        share = cache.kv_bytes / cache.kv_bytes_full
        table.add_row(
            name,
            str(cache.kept_tokens),
            str(cache.kept_tokens + cache.evicted_tokens),
            f"{decimal(cache.kv_bytes)} ({share:.0%})",
            f"{right} of {len(completions)}",
        )
    return table


def main() -> None:
    """Run the demonstration; Ctrl-C and SIGTERM also end its server."""
    # Without a handler, SIGTERM would end this process at once and leave the server running.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        _run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _run() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reference", action="store_true", help="take the packaged model")
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold]1 of 4: the model[/]")
    subject = chosen(console, reference=arguments.reference)
    console.print(f"  {subject.title}", markup=False)
    command = " ".join(["python", *serve_command(subject)])
    console.print("[bold]2 of 4: a server[/]")
    console.print(f"  {command}", markup=False)
    with serving(console, subject) as address:
        console.print("[bold]3 of 4: the same prompt on three caches[/]")
        console.print(
            "  Each reads a text and one question about it. The full cache keeps every token. The "
            f"window keeps the newest {subject.budget}; the table keeps as many, those that each "
            "head finds worth keeping."
        )
        try:
            answers = asyncio.run(compare(console, subject, address))
        except A2SFError as error:
            sys.exit(f"error: {error}")
        console.print("[bold]4 of 4: memory and quality[/]")
        console.print(summary(subject, answers))
    console.print("[bold]The server has stopped cleanly. To go on:[/]")
    if sys.prefix != sys.base_prefix:
        console.print(f"  . {os.path.relpath(sys.prefix)}/bin/activate", markup=False)
    console.print(f"  {command} --port 50051", markup=False)
    console.print("and in another terminal, after the same activation:")
    console.print(
        f"  python -m service.client {subject.ask} --table {subject.table} --budget 64",
        markup=False,
    )


if __name__ == "__main__":
    main()
