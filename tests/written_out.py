"""The block law and a whole Llama, written out token by token in plain Python: the reference.

Owns a second, independent implementation of the definitions, slow and without shortcuts. It shares
no code with `a2sf`, so both cannot have the same fault. Numbers are Python floats (double).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

CUTOFF = 1e-6

Vector = Sequence[float]
Group = Sequence[Vector]
"""One vector for each query head of the KV head's group."""
Outputs = list[list[float]]
"""One attention output for each query head of the group."""


@dataclass
class Stored:
    """One token in one head's cache."""

    position: int
    key: list[float]
    value: list[float]
    score: float = 0.0


@dataclass
class Head:
    """One KV head of one layer of one sequence, with its own budget and window."""

    alpha: float
    budget: int
    recent: int
    sinks: int
    random_score: Callable[[int], float] | None = (
        None  # position -> fixed score, for the random baseline
    )
    tokens: list[Stored] = field(default_factory=list)

    def trim(self, start: int, keep: int) -> None:
        while len(self.tokens) > keep:
            candidates = [t for t in self.tokens if self.sinks <= t.position < start - self.recent]
            lowest = min(candidates, key=lambda t: (t.score, t.position))
            self.tokens.remove(lowest)

    def block(
        self,
        start: int,
        queries: Sequence[Group],
        keys: Sequence[Vector],
        values: Sequence[Vector],
        scale: float,
    ) -> list[Outputs]:
        """Run one block. `queries[j]` is the group's list of query vectors of token start + j.

        Returns, for each token, the group's list of output vectors.
        """
        self.trim(start, self.budget - 1)
        for j, (key, value) in enumerate(zip(keys, values, strict=True)):
            fixed = self.random_score(start + j) if self.random_score else 0.0
            self.tokens.append(Stored(start + j, list(key), list(value), fixed))
        count = len(keys)
        gained = [0.0] * len(self.tokens)
        outputs: list[Outputs] = []
        for j, group in enumerate(queries):
            weight = 1.0 if count - 1 - j == 0 else self.alpha ** (count - 1 - j)
            outputs.append([])
            for query in group:
                seen = [i for i, t in enumerate(self.tokens) if t.position <= start + j]
                logits = [
                    scale * sum(a * b for a, b in zip(query, self.tokens[i].key, strict=True))
                    for i in seen
                ]
                top = max(logits)
                exps = [math.exp(x - top) for x in logits]
                total = sum(exps)
                row = [e / total for e in exps]
                width = len(self.tokens[0].value)
                outputs[-1].append(
                    [
                        sum(p * self.tokens[i].value[d] for p, i in zip(row, seen, strict=True))
                        for d in range(width)
                    ]
                )
                if weight >= CUTOFF:
                    for p, i in zip(row, seen, strict=True):
                        gained[i] += weight * p
        if self.random_score is None:
            for token, gain in zip(self.tokens, gained, strict=True):
                token.score = self.alpha**count * token.score + gain
        return outputs

    def prompt(
        self,
        queries: Sequence[Group],
        keys: Sequence[Vector],
        values: Sequence[Vector],
        scale: float,
        chunk: int,
    ) -> list[Outputs]:
        """Run a whole prompt, cut at multiples of `chunk` (0: one block), and the last trim."""
        length = len(keys)
        chunk = chunk or length
        outputs: list[Outputs] = []
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            outputs += self.block(
                start, queries[start:end], keys[start:end], values[start:end], scale
            )
        self.trim(length, self.budget)
        return outputs
