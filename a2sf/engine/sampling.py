"""Draws tokens from logits for many rows: penalty, bans, temperature, filters and the draw.

Owns the order of these steps, the draw, and the state of each request's draws. A row's token
depends only on its own logits, settings and random numbers, never on other rows: every operation
works along the vocabulary. Knows nothing of caches or schedules.
"""

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from a2sf.engine import filters, rng
from a2sf.requests import Sampling, TokenLogprob, TokenLogprobs

_GREEDY_BELOW = 1e-30
"""Temperatures below this are greedy: a division by them would overflow float32."""

_MOST = 2**31 - 1
"""Upper limit of top_k, larger than any vocabulary."""

_Rows: TypeAlias = slice | Tensor
"""An index of rows: a full slice for all (a view), or int64 indices [n]."""


def choose_seed(sampling: Sampling) -> int:
    """Return the request's seed, or a new one from 0 to 2^63 - 1."""
    return secrets.randbelow(2**63) if sampling.seed is None else sampling.seed


@dataclass(eq=False, kw_only=True)
class SamplingState:
    """The state of one request's draws; `note` updates it after each draw."""

    sampling: Sampling
    seed: int
    """From 0 to 2^63 - 1."""
    draws: int = 0
    """Number of draws so far."""
    seen: Tensor | None = None
    """[vocab] bool on the logits' device: the tokens to penalise for repetition; None: no
    penalty."""
    banned_tokens: Sequence[int] = ()
    """Tokens that must not be drawn while `banned_draws` is above 0."""
    banned_draws: int = 0
    """Number of draws for which the ban still holds."""

    @classmethod
    def start(
        cls,
        sampling: Sampling,
        *,
        seed: int,
        prompt_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
        banned_tokens: Sequence[int] = (),
        banned_draws: int = 0,
    ) -> "SamplingState":
        """Return the state before the first draw; the ban holds for `banned_draws` draws."""
        seen = None
        if sampling.repetition_penalty != 1.0:
            seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            seen[torch.tensor(prompt_ids, dtype=torch.int64, device=device)] = True
        return cls(
            sampling=sampling,
            seed=seed,
            seen=seen,
            banned_tokens=banned_tokens,
            banned_draws=banned_draws,
        )

    def note(self, token: int) -> None:
        """Update the state after `token` was drawn."""
        if self.seen is not None:
            self.seen[token] = True
        self.banned_draws = max(self.banned_draws - 1, 0)
        self.draws += 1


class Batch:
    """Several rows that draw together, with their settings as tensors.

    Valid until a row joins or leaves. It skips work that no row needs: greedy rows only take the
    largest logit, and it sorts only if a row sets top_p.
    """

    def __init__(self, states: Sequence[SamplingState], device: torch.device) -> None:
        self._states = tuple(states)
        settings = [state.sampling for state in states]
        self._penalty = _Setting.of([s.repetition_penalty for s in settings], 1.0, device)
        random = [i for i, s in enumerate(settings) if s.temperature >= _GREEDY_BELOW]
        self._random = _select(random, len(settings), device)
        self._racing = [states[i] for i in random]
        drawn = [settings[i] for i in random]
        self._temperature = torch.tensor(
            [[s.temperature] for s in drawn], dtype=torch.float32, device=device
        )
        self._filters = [
            (keep, setting)
            for keep, setting in (
                (filters.keep_top_k, _Setting.of([min(s.top_k, _MOST) for s in drawn], 0, device)),
                (filters.keep_top_p, _Setting.of([s.top_p for s in drawn], 1.0, device)),
                (filters.keep_min_p, _Setting.of([s.min_p for s in drawn], 0.0, device)),
            )
            if setting is not None
        ]
        # Reused in every step: allocating may cost more than the arithmetic.
        self._scaled = torch.empty(0, dtype=torch.float32, device=device)
        self._probabilities = torch.empty(0, dtype=torch.float32, device=device)

    def draw(self, logits: Tensor) -> list[int | None]:
        """Draw a token for every row from `logits` [rows, vocab] of any float type.

        Returns None for a row whose logits hold NaN or plus infinity, or only minus infinity: no
        token can be drawn. Changes no state, so it may be called again. `SamplingState.note`
        updates the state after a draw.

        Draws by the exponential race: the minimum of `e_i / p_i`, with e_i exponential, is at i
        with probability p_i. This takes one random number per token of the vocabulary, for any
        filters.
        """
        # At least float32: `max` of 16-bit numbers takes four times as long.
        scores, banned = self._allowed(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        # The maximum shows whether all were finite: NaN is larger than any number in `max`.
        if not self._racing:
            best, tokens = scores.max(dim=-1)
        elif len(self._racing) == len(self._states):
            best, tokens = self._race(scores)
        else:
            best, tokens = scores.max(dim=-1)
            raced, tokens[self._random] = self._race(scores)
            best[self._random] = raced.to(best.dtype)
        if banned is not None:
            best = best + banned
        won: list[float] = best.tolist()
        chosen: list[int] = tokens.tolist()
        return [token if math.isfinite(by) else None for token, by in zip(chosen, won, strict=True)]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution of `draw`: [n, vocab] float32 for the n rows that are not greedy.

        `logits` is [rows, vocab]. The order is repetition_penalty, bans, temperature, top_k, top_p,
        min_p; each filter applies to the result of the one before.
        """
        scores, _ = self._allowed(logits)
        probabilities, _ = self._distribution(scores)
        return probabilities.clone()

    def _allowed(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply penalty and bans. Also returns `_spoiled` of the banned logits, [rows], or None."""
        banning = [i for i, s in enumerate(self._states) if s.banned_draws and s.banned_tokens]
        if self._penalty is None and not banning:
            return logits, None
        # Copy: the caller needs the raw logits for logprobs.
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if self._penalty is not None:
            rows, penalty = self._penalty.rows, self._penalty.value
            seen = torch.stack([state.seen for state in self._states if state.seen is not None])
            scores[rows] = filters.penalize_repetition(scores[rows], penalty, seen)
        if not banning:
            return scores, None
        banned = scores.new_zeros(len(scores))
        for i in banning:
            ids = list(self._states[i].banned_tokens)
            banned[i] = _spoiled(scores[i, ids])
            scores[i, ids] = -torch.inf
        return scores, banned

    def _race(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The winning ratios and tokens of the rows that are not greedy: both [n]."""
        ratios, filtered = self._distribution(scores)
        streams = [(state.seed, state.draws) for state in self._racing]
        ratios /= rng.exponential(streams, ratios.shape[1], ratios.device)
        best, tokens = ratios.max(dim=-1)
        return best if filtered is None else best + filtered, tokens

    def _distribution(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities [n, vocab], and `_spoiled` of the input, [n], if filters could hide it.

        Without filters None: softmax turns a whole row with NaN or infinity into NaN.
        """
        scaled = self._scaled
        torch.div(scores[self._random].float(), self._temperature, out=scaled)
        spoiled = _spoiled(scaled) if self._filters else None
        for keep, setting in self._filters:
            scaled[setting.rows] = keep(scaled[setting.rows], setting.value)
        return torch.softmax(scaled, dim=-1, out=self._probabilities), spoiled


def _spoiled(scores: Tensor) -> Tensor:
    """NaN if `scores` [..., n] hold NaN or plus infinity, else 0: [...]."""
    most = scores.amax(dim=-1).clamp(min=0.0)
    return most - most


@dataclass(frozen=True)
class _Setting:
    """The values of one setting, for the rows that use it."""

    rows: _Rows
    value: Tensor
    """[n, 1], float64 or int64."""

    @classmethod
    def of(cls, values: Sequence[float], off: float, device: torch.device) -> "_Setting | None":
        asking = [i for i, value in enumerate(values) if value != off]
        if not asking:
            return None
        dtype = torch.int64 if isinstance(off, int) else torch.float64
        column = torch.tensor([[values[i]] for i in asking], dtype=dtype, device=device)
        return cls(_select(asking, len(values), device), column)


def _select(rows: Sequence[int], count: int, device: torch.device) -> _Rows:
    if len(rows) == count:
        return slice(None)
    return torch.tensor(rows, dtype=torch.int64, device=device)


def logprobs(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprobs]:
    """Return each row's logprob of its token and its `top` most likely tokens.

    `logits` [rows, vocab] are raw, before penalty and filters. The log-softmax runs in float32, or
    in float64 for float64 logits. Alternatives are sorted by falling logprob; on a tie, the lowest
    id first.
    """
    lowest = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(lowest).log_softmax(dim=-1)
    return [
        TokenLogprobs(logprob=row[token].item(), top=tuple(_most_likely(row, count)))
        for row, token, count in zip(scores, tokens, top, strict=True)
    ]


def _most_likely(scores: Tensor, count: int) -> Iterable[TokenLogprob]:
    count = min(count, len(scores))
    if not count:
        return
    # Sorted by id first, so that the stable sort keeps ties in this order.
    ids = (scores >= scores.topk(count).values[-1]).nonzero()[:, 0]
    values, order = scores[ids].sort(descending=True, stable=True)
    pairs = zip(ids[order[:count]].tolist(), values[:count].tolist(), strict=True)
    yield from (TokenLogprob(token_id=token, logprob=value) for token, value in pairs)
