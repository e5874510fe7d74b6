"""Shows the product: questions about one text, with three caches side by side on a real server.

Owns the steps that `make demo` shows. The model is SmolLM2, with the
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
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from a2sf.errors import A2SFError
from a2sf.requests import Sampling
from scripts.demo_subjects import Subject, caches, real_subject, reference_subject
from scripts.real_model import CannotFetch, real_model
from service.client import Client
from service.client.results import Completion

ROOT = Path(__file__).resolve().parents[1]

START_TIMEOUT_S = 300.0


def chosen(console: Console, *, reference: bool) -> Subject:
    """Fetch the real model, or print why the packaged one replaces it."""
    if reference:
        return reference_subject()
    try:
        with _waiting(console, "looking for SmolLM2-135M-Instruct; fetching it takes 93 MB"):
            real_model()
    except (CannotFetch, A2SFError, OSError) as error:
        console.print(f"SmolLM2 is not available: {error}", markup=False)
        console.print("The packaged model is used instead.")
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
        port_file, log = Path(name) / "port", Path(name) / "output"
        with log.open("wb") as output:
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
                        sys.exit(f"the server did not start:\n{log.read_text()}")
                    time.sleep(0.1)
            yield f"127.0.0.1:{port_file.read_text().strip()}"
            server.send_signal(signal.SIGTERM)
            if server.wait(60) != 0:
                sys.exit(f"the server did not stop cleanly:\n{log.read_text()}")
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
