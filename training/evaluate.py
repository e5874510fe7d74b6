"""Measures what the model card states, from the exported weights, and prints it as Markdown.

Owns the measurements: exact recall by form and length, the other generated tasks, negative
log-likelihood on held-out text, multiple-choice accuracy. Generated questions come from the split
``validation``; validation files are read here and nowhere else in this package.

Usage: ``python -m training.evaluate --data-dir DIR [--model DIR] [--examples N]``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.corpus import (
    CHOICE_SETS,
    choice_questions,
    default_data_dir,
    documents,
    gsm8k_text,
    read_jsonl,
)
from tuner.generated import GENERATORS, RECALL_FORMS, Generated, recall

LENGTHS = (64, 128, 256, 512)
BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Scored:
    """Figures of one continuation: summed log-probability in nats, tokens, all tokens greedy."""

    logprob: float
    tokens: int
    exact: bool


class Judge:
    """A model and its tokenizer; scores continuations of prompts, teacher-forced."""

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: str = "bfloat16") -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model: Any = model.to(device).eval()
        self.device = device

    def ids(self, text: str, *, bos: bool = True) -> list[int]:
        """Tokens of a text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.tokenizer.bos_token_id, *ids] if bos else ids

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Each continuation after its prompt; a greedy completion equals it where ``exact``."""
        encoded = [(self.ids(prompt), self.ids(text, bos=False)) for prompt, text in pairs]
        return self.score_ids(encoded)

    @torch.inference_mode()
    def score_ids(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """:meth:`score` for tokens; rows are sorted by length and padded on the right."""
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        scores: dict[int, Scored] = {}
        while order:
            widest = sum(map(len, pairs[order[-1]]))
            chosen = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // widest)))]
            rows = torch.full((len(chosen), widest), self.tokenizer.eos_token_id)
            for row, index in enumerate(chosen):
                ids = pairs[index][0] + pairs[index][1]
                rows[row, : len(ids)] = torch.tensor(ids)
            hidden = self.model.model(rows.to(self.device), use_cache=False).last_hidden_state
            for row, index in enumerate(chosen):
                prompt, text = pairs[index]
                there = slice(len(prompt) - 1, len(prompt) + len(text) - 1)
                found = self.model.lm_head(hidden[row, there]).float()
                wanted = torch.tensor(text, device=self.device)
                nll = functional.cross_entropy(found, wanted, reduction="sum").item()
                exact = bool((found.argmax(-1) == wanted).all())
                scores[index] = Scored(-nll, len(text), exact)
        return [scores[index] for index in range(len(pairs))]


def fitted(
    judge: Judge, make: Callable[[int], Generated], tokens: int, most_facts: int
) -> tuple[Generated, int]:
    """The example with the most facts whose prompt and answer fit into so many tokens."""
    low, high = 2, most_facts
    best = make(low), low
    while low <= high:
        facts = (low + high) // 2
        example = make(facts)
        if len(judge.ids(example.prompt + example.answer)) <= tokens:
            best, low = (example, facts), facts + 1
        else:
            high = facts - 1
    return best


def exact_share(
    judge: Judge, name: str, tokens: int, examples: int, **options: Any
) -> tuple[float, float]:
    """Share of exact greedy answers, and the mean number of facts in the context."""
    generator = recall if name == "recall" else GENERATORS[name]
    chosen: list[tuple[Generated, int]] = []
    for index in range(examples):

        def make(facts: int, seed: str = f"{name}:{tokens}:{options}:{index}") -> Generated:
            return generator(Random(seed), split="validation", facts=facts, **options)

        chosen.append(fitted(judge, make, tokens, 300 if options.get("form") == "pair" else 120))
    scores = judge.score([(example.prompt, example.answer) for example, _ in chosen])
    facts = sum(count for _, count in chosen) / examples
    return sum(score.exact for score in scores) / examples, facts


def text_nll(judge: Judge, texts: Iterable[str], most_tokens: int = 10_000) -> tuple[float, float]:
    """Nats per token and bits per byte over windows of at most 512 tokens, each after bos."""
    windows: list[tuple[list[int], list[int]]] = []
    total_bytes = 0
    for text in texts:
        ids = judge.ids(text, bos=False)[: max(0, most_tokens - sum(len(w) for _, w in windows))]
        total_bytes += len(judge.tokenizer.decode(ids).encode())
        windows += [(judge.ids(""), ids[at : at + 511]) for at in range(0, len(ids), 511)]
    scores = judge.score_ids(windows)
    nats = -sum(score.logprob for score in scores)
    return nats / sum(score.tokens for score in scores), nats / total_bytes / 0.6931471805599453


def choice_accuracy(judge: Judge, path: Path, examples: int) -> tuple[float, float, int]:
    """Accuracy by the likeliest choice text, the accuracy of guessing, and the questions used."""
    questions = choice_questions(path)[:examples]
    pairs = [(q.prompt, f" {choice}\n") for q in questions for choice in q.choices]
    scores = iter(judge.score(pairs))
    right = 0
    for question in questions:
        values = [next(scores).logprob for _ in question.choices]
        right += values.index(max(values)) == question.answer
    guess = sum(1 / len(q.choices) for q in questions) / len(questions)
    return right / len(questions), guess, len(questions)


def measure(judge: Judge, data_dir: Path, examples: int) -> dict[str, Any]:
    """All figures of the card."""
    figures: dict[str, Any] = {"examples": examples, "recall": {}, "tasks": {}}
    for form in RECALL_FORMS:
        figures["recall"][form] = {
            tokens: exact_share(judge, "recall", tokens, examples, form=form) for tokens in LENGTHS
        }
    for name in ("state", "arith", "copy"):
        figures["tasks"][name] = {
            tokens: exact_share(judge, name, tokens, examples) for tokens in (64, 128, 256)
        }
    held_out = documents(data_dir, "held_out")
    held_out["wikitext2 validation"] = [(data_dir / "wikitext2/validation.txt").read_text("utf-8")]
    held_out["gsm8k validation"] = [
        gsm8k_text(row) for row in read_jsonl(data_dir / "gsm8k/validation.jsonl")
    ]
    figures["nll"] = {name: text_nll(judge, texts) for name, texts in held_out.items()}
    figures["choices"] = {
        name: choice_accuracy(judge, data_dir / name / "validation.jsonl", examples)
        for name in CHOICE_SETS
    }
    return figures


def as_markdown(figures: dict[str, Any]) -> str:
    """The tables of the card."""
    lines = ["| recall form | " + " | ".join(f"{n} tokens" for n in LENGTHS) + " |"]
    lines.append("|---|" + "---|" * len(LENGTHS))
    for form, cells in figures["recall"].items():
        shown = (f"{exact:.1%} ({facts:.0f} facts)" for exact, facts in cells.values())
        lines.append(f"| {form} | " + " | ".join(shown) + " |")
    lines += ["", "| task | 64 tokens | 128 tokens | 256 tokens |", "|---|---|---|---|"]
    for name, cells in figures["tasks"].items():
        shown = (f"{exact:.1%}" for exact, _ in cells.values())
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    lines += ["", "| held-out text | nats per token | bits per byte |", "|---|---|---|"]
    lines += [f"| {name} | {n:.3f} | {b:.3f} |" for name, (n, b) in figures["nll"].items()]
    lines += ["", "| multiple choice | accuracy | guessing | n |", "|---|---|---|---|"]
    for name, (accuracy, guess, count) in figures["choices"].items():
        lines.append(f"| {name} | {accuracy:.1%} | {guess:.1%} | {count} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the figures of the model card."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", type=Path, default=Path("a2sf/reference"))
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the raw figures here too")
    args = parser.parse_args()
    judge = Judge(args.model, device=args.device, dtype=args.dtype)
    figures = measure(judge, args.data_dir or default_data_dir(), args.examples)
    print(as_markdown(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
