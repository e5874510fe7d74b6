"""The options of a completion on the wire, as a client in any language sees them."""

import json
import math
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest

from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.status import from_wire
from tests.service.conftest import WAIT_S, StartServer, until
from tests.tiny import save_tiny_llama

Serve: TypeAlias = Callable[..., Awaitable["pb_grpc.InferenceServiceAsyncStub"]]

# As the templates of real models do: special tokens spelled out, turns enforced, a generation
# prompt at the end.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('secret: ' + m.content) }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_llama(tmp_path_factory.mktemp("chat"), max_position_embeddings=10**6)
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))
    return directory


@pytest.fixture
async def serve(start_server: StartServer) -> AsyncIterator[Serve]:
    channels: list[grpc.aio.Channel] = []

    async def started(**options: Any) -> "pb_grpc.InferenceServiceAsyncStub":
        _, _, address = await start_server(**options)
        channels.append(grpc.aio.insecure_channel(address))
        return pb_grpc.InferenceServiceStub(channels[-1])

    yield started
    for channel in channels:
        await channel.close(None)


def greedy(**fields: Any) -> pb.GenerationInput:
    settings = {"max_new_tokens": 6, "ignore_eos": True, "sampling": pb.Sampling(temperature=0.0)}
    return pb.GenerationInput(**{**settings, **fields})


async def whole(
    stub: "pb_grpc.InferenceServiceAsyncStub", message: pb.GenerationInput
) -> pb.GenerateResponse:
    return await stub.Generate(pb.GenerateRequest(input=message), timeout=WAIT_S)


def chat(*messages: tuple[str, str]) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role=r, content=c) for r, c in messages])


async def test_streams_and_whole_responses_have_logprobs_for_every_token(serve: Serve) -> None:
    stub = await serve()
    output = pb.OutputOptions(token_ids=True, logprobs=True, top_logprobs=3)
    message = greedy(text="How likely", output=output)
    answer = await whole(stub, message)
    assert [one.token.token_id for one in answer.logprobs] == list(answer.token_ids)
    for one in answer.logprobs:
        found = [other.logprob for other in one.top]
        assert len(found) == 3
        assert found == sorted(found, reverse=True)
        assert sum(math.exp(logprob) for logprob in found) <= 1.0 + 1e-6
        # Greedy takes the most likely token.
        assert one.token == one.top[0]
        assert one.token.text
    request = pb.StreamGenerateRequest(input=message)
    deltas = [
        response.delta
        async for response in stub.StreamGenerate(request, timeout=WAIT_S)
        if response.WhichOneof("event") == "delta"
    ]
    assert [one for delta in deltas for one in delta.logprobs] == list(answer.logprobs)


async def test_optional_fields_are_sent_only_on_request(serve: Serve) -> None:
    answer = await whole(await serve(), greedy(text="Plain"))
    assert not answer.token_ids
    assert not answer.logprobs
    assert not answer.started.HasField("prompt")
    assert not answer.finished.HasField("matched_stop_token_id")


@pytest.mark.parametrize("given", ["text", "token_ids"])
async def test_the_echo_is_the_prompt_as_the_model_reads_it(serve: Serve, given: str) -> None:
    stub = await serve()
    text = "Écho?"
    ids = list((await stub.Tokenize(pb.TokenizeRequest(text=text), timeout=WAIT_S)).token_ids)
    prompt: dict[str, Any] = {
        "text": {"text": text},
        "token_ids": {"token_ids": pb.TokenIds(ids=ids)},
    }[given]
    answer = await whole(stub, greedy(**prompt, output=pb.OutputOptions(echo=True)))
    assert answer.started.prompt == pb.Prompt(text=text, token_ids=ids)
    assert answer.started.prompt_tokens == len(ids)


async def test_an_unknown_token_id_is_refused_with_echo_too(serve: Serve) -> None:
    stub = await serve()
    message = greedy(token_ids=pb.TokenIds(ids=[1, 2**32 - 1]), output=pb.OutputOptions(echo=True))
    with pytest.raises(grpc.aio.AioRpcError, match="4294967295") as caught:
        await whole(stub, message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_time_limit_ends_a_completion_with_the_tokens_so_far(serve: Serve) -> None:
    stub = await serve()
    message = greedy(text="x", max_new_tokens=900_000, time_limit_seconds=0.3)
    answer = await whole(stub, message)
    assert answer.finished.reason == pb.FINISH_REASON_TIME_LIMIT
    assert 0 < answer.finished.usage.completion_tokens < 900_000
    assert answer.text


async def test_a_stop_token_that_ends_a_completion_is_named(serve: Serve) -> None:
    stub = await serve()
    free = await whole(stub, greedy(text="Halt", output=pb.OutputOptions(token_ids=True)))
    token = free.token_ids[3]
    at = list(free.token_ids).index(token)
    answer = await whole(
        stub, greedy(text="Halt", stop_token_ids=[token], output=pb.OutputOptions(token_ids=True))
    )
    assert answer.finished.reason == pb.FINISH_REASON_STOP
    assert answer.finished.matched_stop_token_id == token
    assert not answer.finished.HasField("matched_stop")
    assert list(answer.token_ids) == list(free.token_ids[: at + 1])
    later = await whole(
        stub,
        greedy(
            text="Halt",
            stop_token_ids=[token],
            min_new_tokens=6,
            output=pb.OutputOptions(token_ids=True),
        ),
    )
    assert token not in later.token_ids
    assert len(later.token_ids) == 6


async def test_a_repetition_penalty_changes_the_completion(serve: Serve) -> None:
    stub = await serve()
    output = pb.OutputOptions(token_ids=True)
    plain = await whole(stub, greedy(text="aaaa", max_new_tokens=40, output=output))
    sampling = pb.Sampling(temperature=0.0, repetition_penalty=100.0)
    punished = await whole(
        stub, greedy(text="aaaa", max_new_tokens=40, sampling=sampling, output=output)
    )
    assert len(set(punished.token_ids)) > len(set(plain.token_ids))


async def test_chat_uses_the_models_template(serve: Serve, chat_model_dir: Path) -> None:
    stub = await serve(model=str(chat_model_dir))
    conversation = chat(("system", "Be brief."), ("user", "Hi!"))
    tokens = await stub.Tokenize(pb.TokenizeRequest(chat=conversation), timeout=WAIT_S)
    assert tokens.text == "<bos>[system]Be brief.[user]Hi![assistant]"
    # The template has written the first token; no second one is put before it.
    assert list(tokens.token_ids).count(tokens.token_ids[0]) == 1
    output = pb.OutputOptions(echo=True, token_ids=True)
    answer = await whole(stub, greedy(chat=conversation, output=output))
    assert answer.started.prompt == pb.Prompt(text=tokens.text, token_ids=tokens.token_ids)
    by_ids = greedy(token_ids=pb.TokenIds(ids=tokens.token_ids), output=output)
    assert (await whole(stub, by_ids)).token_ids == answer.token_ids


async def test_chat_without_a_template_is_refused_by_name(serve: Serve) -> None:
    stub = await serve()
    with pytest.raises(grpc.aio.AioRpcError, match="no chat template") as caught:
        await whole(stub, greedy(chat=chat(("user", "Hi!"))))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_refused_conversation_gets_its_roles_and_the_templates_message(
    serve: Serve, chat_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub = await serve(model=str(chat_model_dir))
    with pytest.raises(grpc.aio.AioRpcError) as caught, caplog.at_level("DEBUG"):
        await whole(stub, greedy(chat=chat(("user", "Hi!"), ("wizard", "abracadabra"))))
    error = str(from_wire(caught.value))
    assert error.startswith("input.chat.messages: ")
    assert "user, wizard" in error
    # The template's own words, which its client may know.
    assert "(secret: abracadabra)" in error
    assert "refused a conversation: TemplateError" in caplog.text
    assert "abracadabra" not in caplog.text, "prompts are not logged, at no level"


async def test_tokenize_returns_the_tokens_that_a_completion_reads(serve: Serve) -> None:
    stub = await serve()
    tokens = await stub.Tokenize(pb.TokenizeRequest(text="Count me"), timeout=WAIT_S)
    answer = await whole(stub, greedy(text="Count me"))
    assert len(tokens.token_ids) == answer.started.prompt_tokens
    assert tokens.text == "Count me"


async def test_only_the_stream_of_a_client_that_stops_reading_is_aborted(
    start_server: StartServer,
) -> None:
    server, client, address = await start_server(stall_timeout_s=0.5, max_batch=2, metrics_port=0)
    # Small windows, so that little is under way unread; a message is padded by its logprobs.
    narrow = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(address, options=narrow) as channel:
        call = pb_grpc.InferenceServiceStub(channel).StreamGenerate(
            pb.StreamGenerateRequest(
                input=greedy(
                    text="x",
                    max_new_tokens=900_000,
                    output=pb.OutputOptions(logprobs=True, top_logprobs=20),
                )
            ),
            timeout=WAIT_S,
        )
        responses = aiter(call)
        assert (await anext(responses)).WhichOneof("event") == "started"
        answer = await client.generate("y", max_new_tokens=50, ignore_eos=True)
        assert answer.finished.usage.completion_tokens == 50
        await until(lambda: not server.num_calls and not server.core.engine.running)
        with pytest.raises(grpc.aio.AioRpcError, match="stopped reading") as caught:
            _ = [response async for response in responses]
        assert caught.value.code() is grpc.StatusCode.ABORTED
    assert server.metrics_url is not None
    with urllib.request.urlopen(server.metrics_url, timeout=WAIT_S) as response:
        assert b'a2sf_requests_total{code="ABORTED",method="StreamGenerate"} 1.0' in response.read()
