"""Writes the events of a completion as messages.

Owns which fields of a response a request selects. Knows nothing of how a request is read, or of
handlers.
"""

from a2sf.model.loader import LoadedModel
from a2sf.requests import Delta, Event, Finished, Started
from a2sf.text.detokenizer import vocabulary
from service.pb import inference_pb2 as pb
from service.policy_messages import effective_policy_to_message
from service.rpc.conversions.requests import EncodedPrompt


class ResponseBuilder:
    """Converts the events of one completion to messages, with the fields that `output` selects."""

    def __init__(self, output: pb.OutputOptions, prompt: EncodedPrompt, model: LoadedModel) -> None:
        """Build the echo, if requested; decoding may be slow: not for the event loop."""
        self._output = output
        self._vocabulary = vocabulary(model.tokenizer)
        self._echo: pb.Prompt | None = None
        if output.echo:
            self._echo = pb.Prompt(text=prompt.decoded(model), token_ids=prompt.token_ids)

    def stream_response(self, event: Event) -> pb.StreamGenerateResponse:
        """Convert one event of a stream."""
        match event:
            case Started():
                return pb.StreamGenerateResponse(started=self.started(event))
            case Delta():
                return pb.StreamGenerateResponse(delta=self.delta(event))
            case Finished():
                return pb.StreamGenerateResponse(finished=finished_message(event))

    def started(self, event: Started) -> pb.GenerationStarted:
        """Convert the first event."""
        return pb.GenerationStarted(
            request_id=event.request_id,
            cache_policy=effective_policy_to_message(event.policy),
            prompt_tokens=event.prompt_tokens,
            seed=event.seed,
            prompt=self._echo,
        )

    def delta(self, event: Delta) -> pb.GenerationDelta:
        """Convert new tokens and text."""
        return pb.GenerationDelta(
            text=event.text,
            token_ids=event.token_ids if self._output.token_ids else (),
            logprobs=[
                pb.TokenLogprobs(
                    token=self._logprob(token_id, one.logprob),
                    top=[self._logprob(other.token_id, other.logprob) for other in one.top],
                )
                for token_id, one in zip(event.token_ids, event.logprobs, strict=False)
            ],
        )

    def _logprob(self, token_id: int, logprob: float) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            token_id=token_id, logprob=logprob, text=self._vocabulary.token_text(token_id)
        )


def finished_message(event: Finished) -> pb.GenerationFinished:
    """Convert the last event."""
    return pb.GenerationFinished(
        reason=pb.FinishReason.Value(f"FINISH_REASON_{event.reason.name}"),
        matched_stop=event.matched_stop,
        matched_stop_token_id=event.matched_stop_token_id,
        usage=pb.Usage(**event.usage.model_dump()),
        cache=pb.CacheStatistics(**event.cache.model_dump()),
        timings=pb.Timings(
            queue_seconds=event.timings.queue_s,
            prefill_seconds=event.timings.prefill_s,
            decode_seconds=event.timings.decode_s,
        ),
    )
