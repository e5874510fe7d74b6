"""The state of one request in the engine: its tokens so far, and when and why it ends.

Owns a sequence's progress and its events. Knows nothing of rows or caches: the engine passes in the
drawn tokens and the sizes of slots.
"""

import math
from dataclasses import dataclass, field
from typing import Self

from a2sf.engine import sampling
from a2sf.model.loader import LoadedModel
from a2sf.policy import EffectivePolicy, Heads
from a2sf.requests import (
    CacheStatistics,
    Delta,
    Finished,
    FinishReason,
    GenerationRequest,
    Started,
    Timings,
    TokenLogprobs,
    Usage,
)
from a2sf.text.detokenizer import TextStream, vocabulary


@dataclass(eq=False, kw_only=True)
class Sequence:
    """The state of one request; times are seconds on the engine's clock."""

    request: GenerationRequest
    policy: EffectivePolicy
    seed: int
    sampling_state: sampling.SamplingState
    """The state of its draws."""
    text: TextStream
    stop_reasons: dict[int, FinishReason]
    """Token that ends the sequence -> the reason to report."""
    named_stops: dict[int, str]
    """Special token that a stop string names -> that string."""
    submitted_at: float
    prefill_at: float | None = None
    first_token_at: float | None = None
    prefilled: int = 0
    """Prompt tokens in the cache so far."""
    running: bool = False
    """Whether prefill is complete and the row decodes."""
    generated: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    """Why it ended normally; None before that."""
    failure: BaseException | None = None
    """The error that ended it; None if there was none."""

    @classmethod
    def queued(
        cls, request: GenerationRequest, policy: EffectivePolicy, model: LoadedModel, now: float
    ) -> Self:
        """Return the initial state of an accepted request with its resolved policy."""
        stop_reasons = find_stop_reasons(request, model)
        seed = sampling.choose_seed(request.sampling)
        return cls(
            request=request,
            policy=policy,
            seed=seed,
            sampling_state=sampling.SamplingState.start(
                request.sampling,
                seed=seed,
                prompt_ids=request.prompt_ids,
                vocab_size=model.shape.vocab_size,
                device=model.device,
                banned_tokens=tuple(stop_reasons),
                banned_draws=request.min_new_tokens,
            ),
            text=TextStream(
                model.tokenizer, request.prompt_ids, request.stop, request.min_new_tokens
            ),
            stop_reasons=stop_reasons,
            named_stops=vocabulary(model.tokenizer).special_named(request.stop),
            submitted_at=now,
        )

    @property
    def num_cached_tokens(self) -> int:
        """Number of tokens that have entered the cache, and so the position of the next one."""
        # The newest token is drawn but has not run through the model yet.
        return self.prefilled + max(len(self.generated) - 1, 0)

    @property
    def stored(self) -> Heads:
        """[layers][H_kv] number of tokens stored in each head; it follows from the law alone.

        Includes the heads of other processes.
        """
        cached = self.num_cached_tokens
        if self.running:
            return tuple(tuple(min(cached, b) for b in layer) for layer in self.policy.head_budgets)
        # The start of the block with the last token.
        start = max(self.prefilled - 1, 0) // self._chunk * self._chunk
        since = self.prefilled - start
        return tuple(
            tuple(min(start, b - 1) + since for b in layer) for layer in self.policy.head_budgets
        )

    @property
    def num_stored(self) -> int:
        """Number of tokens stored, summed over layers and heads, also those of other processes."""
        return sum(map(sum, self.stored))

    @property
    def block(self) -> tuple[int, int]:
        """The current or next block of the prompt: its start and its length, in tokens."""
        start = self.prefilled // self._chunk * self._chunk
        return start, min(self._chunk, len(self.request.prompt_ids) - start)

    @property
    def in_order(self) -> bool:
        """Whether nothing is evicted from the prompt before the end of the current block."""
        return self.block[0] < min(map(min, self.policy.head_budgets))

    @property
    def max_len(self) -> int:
        """The most tokens that the sequence may reach."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens

    @property
    def _chunk(self) -> int:
        return self.policy.prefill_chunk or len(self.request.prompt_ids)

    def overdue(self, now: float) -> bool:
        """Whether the request has reached its time limit."""
        limit = self.request.time_limit_s
        return limit is not None and now - self.submitted_at >= limit

    def started(self) -> Started:
        """Return the stream's first event."""
        return Started(
            request_id=self.request.request_id,
            policy=self.policy,
            prompt_tokens=len(self.request.prompt_ids),
            seed=self.seed,
        )

    def accept(self, token: int, logprobs: TokenLogprobs | None, now: float) -> Delta:
        """Append a drawn token; afterwards `reason` is set if it was the last."""
        if self.first_token_at is None:
            self.first_token_at = now
        self.sampling_state.note(token)
        self.generated.append(token)
        self.reason = self.stop_reasons.get(token)
        text = ""
        if self.reason is None:
            text = self.text.push(token)
            if self.text.matched is not None:
                self.reason = FinishReason.STOP
            elif len(self.generated) >= self.request.max_new_tokens:
                self.reason = FinishReason.LENGTH
        if self.reason is not None:
            text += self._withheld()
        return Delta(
            request_id=self.request.request_id,
            text=text,
            token_ids=(token,),
            logprobs=() if logprobs is None else (logprobs,),
        )

    def time_out(self) -> list[Delta]:
        """End the sequence at its time limit; return the withheld text as a delta, if any."""
        self.reason = FinishReason.TIME_LIMIT
        text = self._withheld()
        return [Delta(request_id=self.request.request_id, text=text, token_ids=())] if text else []

    def statistics(self, *, token_bytes: int, slot_bytes: int) -> CacheStatistics:
        """Return the content of the row now, and its size in the cache, over all processes.

        `token_bytes` is the size of a token's key and value in one head, `slot_bytes` that of a
        slot.
        """
        heads = sum(map(len, self.policy.head_budgets))
        kept_tokens = math.floor(self.num_stored / heads + 0.5)
        return CacheStatistics(
            budget=self.policy.budget,
            kept_tokens=kept_tokens,
            evicted_tokens=self.num_cached_tokens - kept_tokens,
            kv_bytes=self.num_stored * slot_bytes,
            kv_bytes_full=self.num_cached_tokens * heads * token_bytes,
        )

    def finished(self, cache: CacheStatistics, now: float) -> Finished:
        """Return the stream's last event; `reason` must be set."""
        assert self.reason is not None, "the sequence goes on"
        prefill_at = now if self.prefill_at is None else self.prefill_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        return Finished(
            request_id=self.request.request_id,
            reason=self.reason,
            matched_stop=self._matched_stop,
            matched_stop_token_id=self._matched_token,
            usage=Usage(
                prompt_tokens=len(self.request.prompt_ids),
                completion_tokens=len(self.generated),
            ),
            cache=cache,
            timings=Timings(
                queue_s=prefill_at - self.submitted_at,
                prefill_s=first_token_at - prefill_at,
                decode_s=now - first_token_at,
            ),
        )

    @property
    def _matched_stop(self) -> str | None:
        """The stop string that ended the sequence, in its text or as the name of a token."""
        if self.text.matched is not None or self.reason is not FinishReason.STOP:
            return self.text.matched
        return self.named_stops.get(self.generated[-1])

    @property
    def _matched_token(self) -> int | None:
        """The stop token that ended the sequence; None if a stop string did."""
        stopped = self.reason is FinishReason.STOP and self.text.matched is None
        last = self.generated[-1] if stopped else None
        return last if last in self.request.stop_token_ids else None

    def _withheld(self) -> str:
        text = self.text.flush()
        if self.text.matched is not None:
            # The withheld characters completed a stop string.
            self.reason = FinishReason.STOP
        return text


def find_stop_reasons(request: GenerationRequest, model: LoadedModel) -> dict[int, FinishReason]:
    """Return the tokens that end this request, each with its reason."""
    stop_reasons = dict.fromkeys(request.stop_token_ids, FinishReason.STOP)
    if not request.ignore_eos:
        ends = {*model.eos_token_ids, *request.turn_end_ids}
        eos = (i for i in ends if i < model.shape.vocab_size)
        stop_reasons |= dict.fromkeys(eos, FinishReason.END_OF_SEQUENCE)
    # Last, so that STOP wins over END_OF_SEQUENCE for tokens that the request names.
    named = vocabulary(model.tokenizer).special_named(request.stop)
    known = (i for i in named if i < model.shape.vocab_size)
    return stop_reasons | dict.fromkeys(known, FinishReason.STOP)
