"""From logits to tokens: penalty, bans, temperature, the filters and the draw, many rows at once.

Owns the arithmetic of the choice and what a request's draws remember. A row's token depends on its
own logits, settings and noise alone, never on its neighbours: every operation here works along the
vocabulary. Knows nothing of caches or schedules.
"""

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from a2sf import noise
from a2sf.requests import Sampling, TokenLogprob, TokenLogprobs

_GREEDY_BELOW = 1e-30
"""Temperatures below are greedy: dividing by them would overflow float32."""

_MOST = 2**31 - 1
"""Stands for every larger top_k: no vocabulary has as many tokens."""

_Rows: TypeAlias = slice | Tensor
"""Which rows: all as a slice, for a view; some as int64 indices [n]."""


def choose_seed(sampling: Sampling) -> int:
    """Return the request's seed, or a fresh one from 0 to 2^63 - 1."""
    return secrets.randbelow(2**63) if sampling.seed is None else sampling.seed


@dataclass(eq=False, kw_only=True)
class Row:
    """What one request's draws depend on besides its logits; `note` brings it up to date."""

    sampling: Sampling
    seed: int
    """From 0 to 2^63 - 1."""
    draws: int = 0
    """How many it has made."""
    seen: Tensor | None = None
    """[vocab] bool on the logits' device: tokens that repetition_penalty counts; None without."""
    barred: Sequence[int] = ()
    """Tokens that may not be drawn as long as `barred_draws` is above 0."""
    barred_draws: int = 0

    @classmethod
    def start(
        cls,
        sampling: Sampling,
        *,
        seed: int,
        prompt_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
        barred: Sequence[int] = (),
        barred_draws: int = 0,
    ) -> "Row":
        """Return the state before the first draw; `barred` holds for the first `barred_draws`."""
        seen = None
        if sampling.repetition_penalty != 1.0:
            seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            seen[torch.tensor(prompt_ids, dtype=torch.int64, device=device)] = True
        return cls(
            sampling=sampling,
            seed=seed,
            seen=seen,
            barred=barred,
            barred_draws=barred_draws,
        )

    def note(self, token: int) -> None:
        """Take into account that `token` was drawn."""
        if self.seen is not None:
            self.seen[token] = True
        self.barred_draws = max(self.barred_draws - 1, 0)
        self.draws += 1


class Batch:
    """Several rows that draw together, their settings side by side as tensors.

    Stays good for as long as the rows do. Work that no row asks for is left out: greedy rows take
    the largest logit and nothing else, and nothing is sorted unless a row sets top_p.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self._rows = tuple(rows)
        settings = [row.sampling for row in rows]
        self._penalty = _Setting.of([s.repetition_penalty for s in settings], 1.0, device)
        random = [i for i, s in enumerate(settings) if s.temperature >= _GREEDY_BELOW]
        self._random = _select(random, len(settings), device)
        self._racing = [rows[i] for i in random]
        drawn = [settings[i] for i in random]
        self._temperature = torch.tensor(
            [[s.temperature] for s in drawn], dtype=torch.float32, device=device
        )
        self._filters = [
            (keep, setting)
            for keep, setting in (
                (keep_top_k, _Setting.of([min(s.top_k, _MOST) for s in drawn], 0, device)),
                (keep_top_p, _Setting.of([s.top_p for s in drawn], 1.0, device)),
                (keep_min_p, _Setting.of([s.min_p for s in drawn], 0.0, device)),
            )
            if setting is not None
        ]
        # Kept from step to step: fresh memory may cost more than the arithmetic that fills it.
        self._scaled = torch.empty(0, dtype=torch.float32, device=device)
        self._probabilities = torch.empty(0, dtype=torch.float32, device=device)

    def draw(self, logits: Tensor) -> list[int | None]:
        """Choose a token for every row from `logits` [rows, vocab] of any float type.

        None for a row whose logits hold NaN or plus infinity, or nothing above minus infinity: no
        token can be drawn from them. Changes nothing, so that it may be called again; `Row.note`
        takes a draw into account.

        Draws by the exponential race: the least of `e_i / p_i`, with e_i exponential, falls on i
        with probability p_i. It takes one number of noise a token of the vocabulary, whatever the
        filters.
        """
        # In float32 at least: finding the largest of 16-bit numbers takes four times as long.
        scores, banned = self._allowed(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        # What is won by tells whether all was finite: NaN wins over everything.
        if not self._racing:
            best, tokens = scores.max(dim=-1)
        elif len(self._racing) == len(self._rows):
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
        """Return what `draw` would draw from: [n, vocab] float32 for the n rows not greedy.

        `logits` is [rows, vocab]. Filters apply in turn, each to what the one before left:
        repetition_penalty, bans, temperature, top_k, top_p, min_p.
        """
        scores, _ = self._allowed(logits)
        probabilities, _ = self._distribution(scores)
        return probabilities.clone()

    def _allowed(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Penalise and ban. Also `_spoiled` of what is banned, [rows], or None if nothing is."""
        barred = [i for i, row in enumerate(self._rows) if row.barred_draws and row.barred]
        if self._penalty is None and not barred:
            return logits, None
        # A copy: the caller's logits stay raw, for logprobs.
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if self._penalty is not None:
            rows, penalty = self._penalty.rows, self._penalty.value
            seen = torch.stack([row.seen for row in self._rows if row.seen is not None])
            scores[rows] = penalize_repetition(scores[rows], penalty, seen)
        if not barred:
            return scores, None
        banned = scores.new_zeros(len(scores))
        for i in barred:
            ids = list(self._rows[i].barred)
            banned[i] = _spoiled(scores[i, ids])
            scores[i, ids] = -torch.inf
        return scores, banned

    def _race(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """What the rows that are not greedy win by, and their tokens: both [n]."""
        ratios, filtered = self._distribution(scores)
        streams = [(row.seed, row.draws) for row in self._racing]
        ratios /= noise.exponential(streams, ratios.shape[1], ratios.device)
        best, tokens = ratios.max(dim=-1)
        return best if filtered is None else best + filtered, tokens

    def _distribution(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities [n, vocab], and `_spoiled` of what went in, [n], if filters may hide it.

        Without filters there is no need: softmax makes NaN of a whole row with NaN or infinity.
        """
        scaled = self._scaled
        torch.div(scores[self._random].float(), self._temperature, out=scaled)
        spoiled = _spoiled(scaled) if self._filters else None
        for keep, setting in self._filters:
            scaled[setting.rows] = keep(scaled[setting.rows], setting.value)
        return torch.softmax(scaled, dim=-1, out=self._probabilities), spoiled


def _spoiled(scores: Tensor) -> Tensor:
    """NaN where `scores` [..., n] hold NaN or plus infinity, else 0: [...]."""
    most = scores.amax(dim=-1).clamp(min=0.0)
    return most - most


@dataclass(frozen=True)
class _Setting:
    """One setting of the rows that ask for it."""

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


def penalize_repetition(scores: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Divide the positive and multiply the negative `scores` [rows, vocab] of `seen` tokens.

    `penalty` is [rows, 1], `seen` [rows, vocab] bool; each token counts once, as in transformers.
    """
    penalty = penalty.to(scores.dtype)
    penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, penalized, scores)


def keep_top_k(scaled: Tensor, top_k: Tensor) -> Tensor:
    """Put all but the `top_k` [rows, 1] largest of `scaled` [rows, vocab] at minus infinity.

    All that equal the k-th largest stay, as in transformers.
    """
    top_k = top_k.clamp(max=scaled.shape[-1])
    largest = scaled.topk(int(top_k.max()), dim=-1).values
    return _keep(scaled, scaled >= largest.gather(-1, top_k - 1))


def keep_top_p(scaled: Tensor, top_p: Tensor) -> Tensor:
    """Keep of `scaled` [rows, vocab] the fewest tokens whose probabilities reach `top_p` [rows, 1].

    A token stays where those before it, by falling probability and rising id, sum to less than
    top_p. So of equals at the edge the lowest ids stay, where transformers, which sums from below,
    keeps whichever its sort puts last.
    """
    probabilities = scaled.softmax(dim=-1)
    # Those of less than an equal share of what may be left out never stay; half, for rounding.
    least = ((1.0 - top_p - 1e-5) / (2 * scaled.shape[-1])).clamp(min=0.0)
    descending, order = _descending(probabilities, least.float())
    before = descending.cumsum(dim=-1) - descending
    kept = torch.zeros_like(scaled, dtype=torch.bool)
    # A top_p that is 0 in float32 would keep nothing, where the likeliest token always stays.
    top_p = top_p.float().clamp(min=torch.finfo(torch.float32).tiny)
    return _keep(scaled, kept.scatter_(-1, order, before < top_p))


def keep_min_p(scaled: Tensor, min_p: Tensor) -> Tensor:
    """Drop from `scaled` [rows, vocab] what is less likely than `min_p` [rows, 1] of the top."""
    probabilities = scaled.softmax(dim=-1)
    least = min_p.float() * probabilities.amax(dim=-1, keepdim=True)
    return _keep(scaled, probabilities >= least)


def _keep(scaled: Tensor, kept: Tensor) -> Tensor:
    # Ten times as fast as `masked_fill` on the processor.
    return torch.where(kept, scaled, -torch.inf)


def _descending(probabilities: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Sort [rows, vocab] stably; what is not above `least` [rows, 1] may be left out."""
    # At least one: of a row of NaN nothing is above anything.
    width = max(int((probabilities > least).sum(dim=-1).max()), 1)
    if 4 * width > probabilities.shape[-1]:
        return probabilities.sort(dim=-1, descending=True, stable=True)
    # Finding a few costs a fraction of sorting them all. The second sort is stable, so ids rise.
    ids = probabilities.topk(width, dim=-1).indices.sort(dim=-1).values
    descending, order = probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return descending, ids.gather(-1, order)


def logprobs(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprobs]:
    """Return each row's logprob of its token and its `top` most likely tokens.

    `logits` [rows, vocab] are raw, before any penalty or filter; their log-softmax is taken in
    float32, or float64 where they are. Alternatives fall by logprob, the lowest id first on a tie.
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
    # In order of their ids, so that the stable sort leaves equals in it.
    ids = (scores >= scores.topk(count).values[-1]).nonzero()[:, 0]
    values, order = scores[ids].sort(descending=True, stable=True)
    pairs = zip(ids[order[:count]].tolist(), values[:count].tolist(), strict=True)
    yield from (TokenLogprob(token_id=token, logprob=value) for token, value in pairs)
