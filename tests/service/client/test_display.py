"""The display of a completion: the text, one line of figures, and the words for its policy."""

import sys

import pytest

from a2sf.cache.budgets import resolve
from a2sf.model.loader import LoadedModel
from a2sf.policy import CachePolicy
from a2sf.requests import CacheStatistics, Finished, FinishReason, Started, Timings, Usage
from service.client.responses import stream_event
from service.client.results import Delta, StreamStarted
from service.client.terminal.display import TextDisplay, effective_policy, figures
from service.pb import inference_pb2 as pb
from service.policy_messages import describe_policy
from service.rpc.conversions.requests import EncodedPrompt
from service.rpc.conversions.responses import ResponseBuilder
from tests.tables import make_table


def test_control_characters_of_the_model_do_not_reach_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    event = Delta(request_id="r", text="a\x1b[2J\tb\r\n\x9b", token_ids=())
    for terminal, shown in [(True, "a\ufffd[2J\tb\n\ufffd"), (False, event.text)]:
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        TextDisplay().show(pb.StreamGenerateResponse(), event)
        assert capsys.readouterr().out == shown


def test_figures_are_one_readable_line() -> None:
    finished = Finished(
        request_id="r",
        reason=FinishReason.LENGTH,
        matched_stop=None,
        usage=Usage(prompt_tokens=100, completion_tokens=21),
        cache=CacheStatistics(
            budget=64,
            kept_tokens=64,
            evicted_tokens=56,
            kv_bytes=1_500_000,
            kv_bytes_full=2_800_000,
        ),
        timings=Timings(queue_s=0.0, prefill_s=0.1, decode_s=2.0),
    )
    assert figures(finished, "table mathqa, budget 64 tokens", heads_differ=False) == (
        "21 tokens (length), 10.0 tokens/s; table mathqa, budget 64 tokens; "
        "each head kept 64 of 120 tokens, evicted 56; KV 1.5 MB against 2.8 MB in a full cache"
    )
    # A mean says that it is one.
    assert "; each head kept 64 of 120 tokens on average, evicted 56; " in figures(
        finished, "table mathqa, budget 64 tokens", heads_differ=True
    )


@pytest.mark.parametrize(
    "policy",
    [
        CachePolicy(table="made-up"),
        CachePolicy(alpha=0.5, budget=20, recent=3),
        CachePolicy(preset="h2o", budget=20),
        CachePolicy(preset="window", budget=20),
        CachePolicy(preset="random", budget=20, recent=4),
        CachePolicy(preset="full"),
    ],
    ids=str,
)
def test_server_and_client_describe_a_policy_in_the_same_words(
    tiny_model: LoadedModel, policy: CachePolicy
) -> None:
    table = make_table(tiny_model.identity, budget=20, recent=4) if policy.table else None
    effective = resolve(
        policy,
        table=table,
        server=CachePolicy(),
        length=60,
        slots=64,
        num_layers=tiny_model.shape.num_layers,
        num_kv_heads=tiny_model.identity.num_kv_heads,
    )
    event = Started(request_id="r", policy=effective, prompt_tokens=5, seed=0)
    builder = ResponseBuilder(pb.OutputOptions(), EncodedPrompt("x", (1,)), tiny_model)
    started = stream_event(builder.stream_response(event), "r")
    assert isinstance(started, StreamStarted)
    if table is not None:
        policy = CachePolicy(table="made-up", budget=20, recent=4)
    assert describe_policy(effective_policy(started)) == describe_policy(policy)
