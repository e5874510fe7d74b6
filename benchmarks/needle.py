"""Counts correct answers about a fact at the beginning of a prompt, through a real server.

Owns one trial. Each prompt is a chat message with a fact, real text of some thousand tokens, and a
question about the fact. A server (`python -m service`) answers it under several policies with equal
budgets, by greedy decoding. An answer is correct if it names the right place.

    python -m benchmarks.needle --table FILE [--tokens 3000] [--prompts 20] [--out FILE]
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from a2sf.model.loader import load_model
from a2sf.policy import CachePolicy
from a2sf.requests import ChatMessage, Sampling
from a2sf.tablefile import load_table
from benchmarks import RESULTS, ROOT, save
from benchmarks.serving import TIMEOUT_S, served
from service.client import SyncClient
from tuner.data import datasets
from tuner.data.generated import NAMES

NEW_TOKENS = 16

THINGS = ("key", "passport", "camera", "notebook", "umbrella", "medal", "lantern", "compass")
HIDING_PLACES = (
    *("cellar", "garden", "attic", "library", "kitchen", "garage", "chapel", "stable"),
    *("harbour", "museum"),
)


def questions(text: str, characters: int, count: int) -> Iterator[tuple[str, str]]:
    """Yield prompts with that many characters of `text` each, and the word of the right answer."""
    rng = Random(0)
    facts = rng.sample(list(product(NAMES, THINGS, HIDING_PLACES)), count)
    for name, thing, place in facts:
        start = rng.randrange(len(text) - characters)
        # Whole words only: the text is cut at spaces.
        filler = text[start : start + characters].split(" ", 1)[1].rsplit(" ", 1)[0]
        yield (
            f"Remember this: {name} hid the {thing} in the {place}.\n\nHere is some text.\n\n"
            f"{filler}\n\nQuestion: In which place is the {thing} that {name} hid?",
            place,
        )


def shown(table: Path) -> str:
    """The table's path in the repository; elsewhere its file's name."""
    whole = table.resolve()
    return str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else whole.name


def compare(
    table: Annotated[Path, typer.Option(help="An alpha table of the model.")],
    model: Annotated[str, typer.Option(help="As for the server.")] = "build/real/smollm2",
    dataset: Annotated[
        str, typer.Option(help="Its validation text fills the prompt.")
    ] = "wikitext2",
    tokens: Annotated[int, typer.Option(help="Approximate tokens of a prompt.")] = 3000,
    prompts: Annotated[int, typer.Option(help="Number of prompts.")] = 20,
    ratio: Annotated[float, typer.Option(help="Budget as a share of prompt and answer.")] = 0.2,
    threads: Annotated[int, typer.Option(help="Threads of the server.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="File of the JSON.")] = RESULTS / "needle-cpu.json",
) -> None:
    """Ask every question under every policy; write the counts with machine and versions."""
    loaded = load_model(model, device="cpu", dtype="float32")
    fitted = load_table(table, loaded.identity)
    text = datasets.load(dataset, Path(os.environ[datasets.DATA_DIR_VARIABLE])).validation.text
    characters = round(tokens * len(text) / len(loaded.encode(text)))
    uniform = fitted.evidence.uniform
    assert uniform is not None, "the table does not say which uniform setting was best"
    policies = {
        "full": CachePolicy(preset="full"),
        "table": CachePolicy(table=fitted.name, budget_ratio=ratio),
        f"a2sf:{uniform.alpha:.4g}:{uniform.recent_share:g}:{uniform.sinks}": CachePolicy(
            alpha=uniform.alpha,
            recent_share=uniform.recent_share,
            sinks=uniform.sinks,
            budget_ratio=ratio,
        ),
        "h2o": CachePolicy(preset="h2o", budget_ratio=ratio),
        "window": CachePolicy(preset="window", budget_ratio=ratio),
    }
    right: dict[str, list[bool]] = {name: [] for name in policies}
    lengths = []
    slots = str(round(1.5 * tokens))
    with tempfile.TemporaryDirectory() as tables, ExitStack() as stack:
        shutil.copy(table, tables)
        address = stack.enter_context(
            served(
                *("--model", model, "--tables", tables, "--slots", slots, "--max-batch", "1"),
                *("--max-prefill-tokens", slots, "--threads", str(threads)),
                # Policies are compared at equal bytes: no minimum budget may raise a ratio.
                *("--min-budget", "0"),
            )
        )
        client = stack.enter_context(SyncClient(address))
        for question, place in questions(text, characters, prompts):
            chat = [ChatMessage(role="user", content=question)]
            for name, policy in policies.items():
                answer = client.generate(
                    chat,
                    max_new_tokens=NEW_TOKENS,
                    sampling=Sampling(temperature=0.0),
                    cache_policy=policy,
                    timeout_s=TIMEOUT_S,
                )
                right[name].append(place in answer.text.lower())
            lengths.append(answer.started.prompt_tokens)
            typer.echo({name: sum(one) for name, one in right.items()}, err=True)
    rows: list[dict[str, Any]] = [
        {"policy": name, "right": sum(one), "of": len(one)} for name, one in right.items()
    ]
    for row in rows:
        typer.echo(f"{row['policy']:>24} {row['right']:3d} of {row['of']}")
    save(
        out,
        loaded,
        table=shown(table),
        dataset=dataset,
        prompt_tokens=[min(lengths), max(lengths)],
        ratio=ratio,
        rows=rows,
        answers=right,
    )


if __name__ == "__main__":
    typer.run(compare)
