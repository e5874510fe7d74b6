"""Batches: documents of a stage's mixture, tokenized, weighted and packed into rows.

Owns how a generated episode or a text becomes weighted tokens. Batch number n of a seed is always
the same, so a resumed run continues as if it had never stopped. Knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer

from training.config import Stage
from training.corpus import documents
from training.model import BOS_ID, EOS_ID
from tuner.data.generated import (
    Episode,
    arith_episode,
    copy_episode,
    recall_episode,
    state_episode,
)

# Tokens of a stated fact, and of a question with its answer (and of its having been asked before).
COSTS: dict[str, tuple[float, float]] = {
    "recall/list": (3, 3),
    "recall/sentence": (8, 10),
    "recall/pair": (9, 11),
    "recall/story": (13, 11),
    "recall/talk": (9, 23),
    "state/value": (6.3, 10.5),
    "state/held": (5, 8),
    "state/counter": (7.5, 11),
    "arith": (5, 15),
}
MOST_FACTS = 120


@dataclass(frozen=True)
class Document:
    """Token ids, the loss weight of each token, and whether it belongs to an answer."""

    ids: list[int]
    weights: list[float]
    answer: list[bool]


@dataclass(frozen=True)
class Batch:
    """``inputs``, ``targets``, ``weights``, ``source`` are ``[rows, length]``.

    ``source`` is the index into the stage's mixture of a target that belongs to an answer, else -1.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    source: torch.Tensor


def episode_of(rng: Random, task: str, tokens: int) -> Episode:
    """A training episode of about this many tokens, context and questions together."""
    if task == "copy":
        rounds = rng.choice((1, 1, 2))
        words = max(2, tokens // (rounds + 1) - 3)
        return copy_episode(rng, split="train", facts=words, questions=rounds)
    per_fact, per_turn = COSTS[task]
    share = rng.uniform(0.35, 0.9)
    facts = max(2, min(MOST_FACTS, int(share * tokens / per_fact)))
    turns = max(1, min(facts, int((tokens - facts * per_fact) / per_turn)))
    name, _, form = task.partition("/")
    if name == "arith":
        return arith_episode(rng, split="train", facts=facts, questions=turns)
    episode: Callable[..., Episode] = state_episode if name == "state" else recall_episode
    return episode(rng, split="train", facts=facts, questions=turns, form=form)


class Mixture:
    """Batches of the stages; holds the tokenized text documents, about 3 million tokens."""

    def __init__(self, tokenizer: Tokenizer, data_dir: Path | None, *, seed: int) -> None:
        """Without a data directory only stages of generated tasks can be drawn."""
        self._tokenizer = tokenizer
        self._seed = seed
        self._texts: dict[str, list[list[int]]] = {}
        if data_dir is not None:
            for name, pieces in documents(data_dir, "train").items():
                encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
                self._texts[name] = [encoding.ids for encoding in encoded]

    def batch(self, stage: Stage, step: int) -> Batch:
        """The batch of this step: ``stage.batch_tokens`` tokens in rows of one length."""
        rng = Random(f"{self._seed}:{step}")
        names = list(stage.mixture)
        chances = list(stage.mixture.values())
        length = rng.choice(stage.lengths)
        rows = stage.batch_tokens // length
        ids = torch.full((rows, length + 1), EOS_ID, dtype=torch.long)
        weights = torch.zeros(rows, length + 1)
        source = torch.full((rows, length + 1), -1, dtype=torch.long)
        for row in range(rows):
            at = 0
            while at < length:
                kind = rng.choices(range(len(names)), chances)[0]
                document = self._document(rng, stage, names[kind], length)
                room = length + 1 - at
                end = at + len(document.ids[:room])
                ids[row, at:end] = torch.tensor(document.ids[:room])
                weights[row, at:end] = torch.tensor(document.weights[:room])
                answer = torch.tensor(document.answer[:room])
                source[row, at:end] = torch.where(answer, kind, -1)
                at = end
        return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:], source[:, 1:])

    def _document(self, rng: Random, stage: Stage, name: str, length: int) -> Document:
        if name in self._texts:
            ids = _window(rng, [BOS_ID, *rng.choice(self._texts[name]), EOS_ID], length)
            return Document(ids, [1.0] * len(ids), [False] * len(ids))
        episode = episode_of(rng, name, min(length, rng.randint(*stage.document_tokens)))
        return self.weigh(episode, stage.context_weight)

    def weigh(self, episode: Episode, context_weight: float) -> Document:
        """Tokens of an episode, answers at weight 1, all else at ``context_weight``."""
        pieces = [episode.context, *(part for turn in episode.turns for part in turn)]
        ids, weights, answer = [BOS_ID], [context_weight], [False]
        encoded = self._tokenizer.encode_batch(pieces, add_special_tokens=False)
        for index, encoding in enumerate(encoded):
            is_answer = index > 0 and index % 2 == 0
            ids += encoding.ids
            weights += [1.0 if is_answer else context_weight] * len(encoding.ids)
            answer += [is_answer] * len(encoding.ids)
        return Document([*ids, EOS_ID], [*weights, context_weight], [*answer, False])


def _window(rng: Random, ids: list[int], length: int) -> list[int]:
    """The whole document, or of a long one a random window, begun with bos."""
    if len(ids) <= length + 1:
        return ids
    start = rng.randint(1, len(ids) - length) if rng.random() < 0.7 else 1
    return [BOS_ID, *ids[start : start + length]]
