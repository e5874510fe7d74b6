"""Measures how eviction changes a model's predictions on a fixed list of examples.

Owns the cost: mean KL(full cache || evicted cache) of the next-token distribution, in nats at
temperature 1, over the counted positions of an example, and the negative log-likelihood of the true
token. Values are kept by example, because paired statistics need them. Knows nothing of searching;
the block law itself is in `a2sf.offline.teacher_forcing`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from a2sf.cache.budgets import resolve
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.prompts import Prompt, nbytes
from a2sf.offline.teacher_forcing import Example, LayerInput
from a2sf.policy import CachePolicy, EffectivePolicy
from a2sf.schema import TablePolicy
from tuner.evaluation.divergence import (
    check_finite,
    divergence,
    full_cache,
    negative_log_likelihood,
)
from tuner.evaluation.slot_rules import AdaKV, Pyramid

DESCRIPTION = (
    "mean KL(full cache || evicted cache) of the next-token distribution, nats, temperature 1"
)


PROMPT_BYTES = 1 << 30
"""Largest memory for stored prompts; above it, prompts are run with every candidate."""

ROWS_PER_PASS = 32
"""Examples per pass. Up to about this number, most of a pass is fixed cost (measured on two cores
with the packaged model), so candidates with few rows share a pass."""

Candidate = TablePolicy | CachePolicy | Pyramid | AdaKV
"""What can be compared: a table with its budget and protection, a preset, or another rule."""


@dataclass(frozen=True)
class Cost:
    """The cost of one candidate, by example."""

    kl: NDArray[np.float64]
    """[examples] nats."""
    nll: NDArray[np.float64]
    """[examples] nats per token, of the true next token."""

    @property
    def mean(self) -> float:
        """Mean KL over examples, in nats."""
        return float(self.kl.mean())


class Objective:
    """Costs of candidates on `examples`. The full cache is run once, on first use, and stored.

    The computed tensors of the prompts are stored too, for candidates that read prompts exactly.
    Memory: examples x counted positions x vocabulary x 4 bytes for the full cache's predictions; up
    to PROMPT_BYTES for the prompts; and with an anchor, tokens x hidden x the size of the model's
    dtype.
    """

    def __init__(
        self,
        model: LoadedModel,
        examples: Sequence[Example],
        *,
        label: str,
        on_progress: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Run nothing yet. Long work is announced to `watch`, in words with the label."""
        self.model = model
        self.examples = examples
        self._label = label
        self._on_progress = on_progress
        self._anchor: tuple[TablePolicy, LayerInput] | None = None

    @cached_property
    def _full(self) -> list[Tensor]:
        starts = range(0, len(self.examples), ROWS_PER_PASS)
        found: list[Tensor] = []
        for number, first in enumerate(starts, start=1):
            self._on_progress(
                f"full cache on {self._label} examples, pass {number} of {len(starts)}"
            )
            found += full_cache(self.model, self.examples[first : first + ROWS_PER_PASS])
        for example, log_p in zip(self.examples, found, strict=True):
            check_finite(
                example,
                "full cache's negative log-likelihood",
                negative_log_likelihood(example, log_p),
            )
        return found

    @property
    def full_nll(self) -> NDArray[np.float64]:
        """[examples] nats per token with the full cache."""
        return np.array(
            [negative_log_likelihood(*pair) for pair in zip(self.examples, self._full, strict=True)]
        )

    def anchor(self, policy: TablePolicy, layer: int) -> float:
        """Store the input of `layer` under a policy, until the next anchor.

        Candidates that agree with the policy below that layer then start there, because their input
        to the layer is the same. Returns the share of the model's layers that had to be run.
        """
        below = _policy_below(policy, layer)
        if self._anchor is not None and self._anchor[0] == below:
            return 0.0
        policies = [effective(policy, self.model, len(e.token_ids)) for e in self.examples]
        stored = self._layer_input([policy])
        if stored is not None and stored.layer > layer:
            stored = None
        found = teacher_forcing.compute_layer_input(
            self.model,
            self.examples,
            policies,
            layer,
            batch=ROWS_PER_PASS,
            layer_input=stored,
            prompts=self._stored_prompts(policies),
        )
        self._anchor = (below, found)
        return (layer - (stored.layer if stored else 0)) / self.model.shape.num_layers

    def share_of_layers(self, candidate: Candidate) -> float:
        """The share of the model's layers that measuring a candidate would run."""
        stored = self._layer_input([candidate])
        layers = self.model.shape.num_layers
        return 1.0 if stored is None else (layers - stored.layer) / layers

    def _layer_input(self, candidates: Sequence[Candidate]) -> LayerInput | None:
        """The stored input of a layer, if it is valid for all of these candidates."""
        if self._anchor is None:
            return None
        policy, layer_input = self._anchor
        agree = all(
            isinstance(c, TablePolicy) and _policy_below(c, layer_input.layer) == policy
            for c in candidates
        )
        return layer_input if agree else None

    def costs(
        self, candidates: Sequence[Candidate], examples: range | None = None
    ) -> Iterator[Cost]:
        """Yield each candidate's cost on the examples of the range (None: all), in order.

        Candidates with few rows share passes. This is a generator, so that the results of a long
        list can be shown and stored early.
        """
        chosen = range(len(self.examples)) if examples is None else examples
        at_once = max(1, ROWS_PER_PASS // len(chosen))
        for first in range(0, len(candidates), at_once):
            group = candidates[first : first + at_once]
            rows = [(candidate, index) for candidate in group for index in chosen]
            values = []
            for start in range(0, len(rows), ROWS_PER_PASS):
                values += self._pass(rows[start : start + ROWS_PER_PASS])
            for number in range(len(group)):
                kl, nll = zip(
                    *values[number * len(chosen) : (number + 1) * len(chosen)], strict=True
                )
                yield Cost(kl=np.array(kl), nll=np.array(nll))

    def cost(self, candidate: Candidate, examples: range | None = None) -> Cost:
        """Return one candidate's cost on the examples of the range (None: all)."""
        return next(self.costs([candidate], examples))

    def _pass(self, rows: Sequence[tuple[Candidate, int]]) -> list[tuple[float, float]]:
        examples = [self.examples[index] for _, index in rows]
        policies = [
            effective(candidate, self.model, len(example.token_ids))
            for (candidate, _), example in zip(rows, examples, strict=True)
        ]
        stored = self._layer_input([candidate for candidate, _ in rows])
        if stored is not None:
            hidden = tuple(stored.hidden[index] for _, index in rows)
            stored = LayerInput(stored.layer, hidden)
        prompts = self._stored_prompts(policies)
        predicted = teacher_forcing.predictions(
            self.model,
            examples,
            policies,
            batch=ROWS_PER_PASS,
            layer_input=stored,
            prompts=[prompts[index] for _, index in rows] if prompts else None,
        )
        found = {
            row: divergence(examples[row], prediction, self._full[rows[row][1]])
            for row, prediction in predicted
        }
        return [found[row] for row in range(len(rows))]

    def _stored_prompts(self, policies: Sequence[EffectivePolicy]) -> list[Prompt] | None:
        """The stored prompts, if all policies read prompts exactly."""
        if any(policy.prefill_chunk != 0 for policy in policies):
            return None
        return self._prompts

    @cached_property
    def _prompts(self) -> list[Prompt] | None:
        return read_prompts(self.model, self.examples)


def _policy_below(policy: TablePolicy, layer: int) -> TablePolicy:
    """The part of a policy that determines the input of a layer."""
    return policy.model_copy(update={"alpha": policy.alpha[:layer]})


def read_prompts(model: LoadedModel, examples: Sequence[Example]) -> list[Prompt] | None:
    """Read prompts once for several candidates; None if that would take too much memory."""
    tokens = sum(example.prompt_tokens for example in examples)
    if nbytes(model.shape, model.dtype, tokens) > PROMPT_BYTES:
        return None
    return teacher_forcing.read_prompts(model, examples, batch=ROWS_PER_PASS)


def effective(candidate: Candidate, model: LoadedModel, length: int) -> EffectivePolicy:
    """Resolve a candidate for a sequence of `length` tokens, by the rules of serving.

    One rule differs: no floor raises a ratio here, neither a server's nor the table's own, because
    candidates are compared at equal bytes.
    """
    if isinstance(candidate, Pyramid):
        equal = effective(candidate.equal, model, length)
        return effective(candidate.table(equal, length), model, length)
    if isinstance(candidate, AdaKV):
        return candidate.pooled(effective(candidate.equal, model, length))
    table = candidate if isinstance(candidate, TablePolicy) else None
    return resolve(
        CachePolicy(min_budget=0) if isinstance(candidate, TablePolicy) else candidate,
        table=table,
        server=CachePolicy(),
        length=length,
        # A fixed budget may be larger than a short example.
        slots=max(length, candidate.budget or 0),
        num_layers=model.shape.num_layers,
        num_kv_heads=model.shape.num_kv_heads,
    )
