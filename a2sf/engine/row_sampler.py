"""Draws a token for each row of a batch; an error in one row does not reach the others.

Owns the sampling batch of the active rows, and the fallback from all rows together to each row
alone. Knows nothing of caches, events or schedules.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from a2sf.engine import sampling
from a2sf.engine.sequence import Sequence
from a2sf.engine.staging import NOT_FINITE
from a2sf.errors import NonFinite, raise_if_fatal
from a2sf.requests import TokenLogprobs

Result = TypeVar("Result")


@dataclass(frozen=True)
class Drawn:
    """A drawn token, and its logprobs if the request asks for them."""

    token: int
    logprobs: TokenLogprobs | None


class RowSampler:
    """Draws tokens for the active rows, all together or only the newest."""

    def __init__(
        self, device: torch.device, fail: Callable[[Sequence, BaseException], None]
    ) -> None:
        """`fail` records that an error ended a sequence; it raises if the error is fatal."""
        self._device = device
        self._fail = fail
        self._batch: sampling.Batch | None = None
        """The sampling batch of all active rows; None after rows have changed."""

    def forget_batch(self) -> None:
        """Call this after a row has joined, moved or left."""
        self._batch = None

    def sample(
        self, sequences: list[Sequence], logits: Tensor, *, all_rows: bool
    ) -> list[Drawn | None]:
        """Draw a token for each sequence; None for a sequence that failed.

        Args:
            sequences: one per row.
            logits: [rows, vocab], of any float type.
            all_rows: whether these are all active rows.
        """
        tokens = self._rowwise(
            sequences, lambda part: self._draw(sequences[part], logits[part], all_rows)
        )
        for sequence, token in zip(sequences, tokens, strict=True):
            if token is None and sequence.failure is None:
                self._fail(sequence, NonFinite(NOT_FINITE))
        logprobs = self._logprobs(sequences, logits, tokens)
        return [
            None
            if token is None or sequence.failure is not None
            else Drawn(token, logprobs.get(sequence))
            for sequence, token in zip(sequences, tokens, strict=True)
        ]

    def _draw(self, sequences: list[Sequence], logits: Tensor, all_rows: bool) -> list[int | None]:
        states = [sequence.sampling_state for sequence in sequences]
        if not all_rows:
            return sampling.Batch(states, self._device).draw(logits)
        if self._batch is None:
            self._batch = sampling.Batch(states, self._device)
        return self._batch.draw(logits)

    def _logprobs(
        self, sequences: list[Sequence], logits: Tensor, tokens: list[int | None]
    ) -> dict[Sequence, TokenLogprobs]:
        asking = [
            (sequence, index, token)
            for index, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
            if token is not None and sequence.request.logprobs
        ]
        if not asking:
            return {}

        def find(part: slice) -> list[TokenLogprobs]:
            some, at, drawn = zip(*asking[part], strict=True)
            return sampling.logprobs(
                logits[list(at)], drawn, [one.request.top_logprobs for one in some]
            )

        asked = [sequence for sequence, _, _ in asking]
        found = zip(asked, self._rowwise(asked, find), strict=True)
        return {sequence: one for sequence, one in found if one is not None}

    def _rowwise(
        self, sequences: list[Sequence], work: Callable[[slice], Iterable[Result]]
    ) -> list[Result | None]:
        """Call `work` for all sequences together; if it raises, for each one alone.

        So only the sequences at fault fail; they get None. `work` returns one result per sequence
        of a slice; a result must not depend on the slice.
        """
        try:
            return [*work(slice(0, len(sequences)))]
        except BaseException as error:
            raise_if_fatal(error)
        results: list[Result | None] = []
        for index, sequence in enumerate(sequences):
            try:
                results += work(slice(index, index + 1))
            except BaseException as error:
                self._fail(sequence, error)
                results.append(None)
        return results
