"""Every value that a caller gives reaches its field, or is refused with the name of the field."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import FloatValue

import service.client
from a2sf.errors import InvalidArgument, InvalidRequest, NonFinite, TableError
from a2sf.policy import CachePolicy
from a2sf.requests import Sampling
from service.client import ChannelOptions, ChatMessage, Tls, requests
from service.pb import inference_pb2 as pb
from service.status import CODES


def test_every_field_of_a_request_can_be_set() -> None:
    message = requests.generation_input(
        "x",
        9,
        {
            "request_id": "r",
            "min_new_tokens": 2,
            "time_limit_s": 1.5,
            "sampling": Sampling(repetition_penalty=1.2, top_k=3, seed=0, min_p=0.1, top_p=0.5),
            "stop": ["a"],
            "stop_token_ids": [1],
            "ignore_eos": True,
            "cache_policy": CachePolicy(budget=3),
            "token_ids": True,
            "logprobs": True,
            "top_logprobs": 4,
            "echo": True,
        },
    )
    sent = {field.name for field, _ in message.ListFields()}
    assert sent == {f.name for f in pb.GenerationInput.DESCRIPTOR.fields} - {"token_ids", "chat"}
    for part in (message.sampling, message.output):
        assert {f.name for f, _ in part.ListFields()} == {f.name for f in part.DESCRIPTOR.fields}
    assert message.time_limit_seconds == 1.5
    assert message.sampling.repetition_penalty == 1.2


def test_a_request_without_options_sets_no_time_limit() -> None:
    message = requests.generation_input("x", 9, {})
    assert not message.HasField("time_limit_seconds")
    assert not message.output.ListFields()


def test_conversations_accept_values_and_mappings() -> None:
    by_value = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content=""),
    ]
    by_mapping = [dict(message) for message in by_value]
    assert requests.tokenize_request(by_value) == requests.tokenize_request(by_mapping)
    message = requests.generation_input(by_mapping, 1, {})
    assert [(m.role, m.content) for m in message.chat.messages] == [
        ("system", "Be brief."),
        ("user", ""),
    ]


@pytest.mark.parametrize(
    ("prompt", "field", "problem"),
    [
        (b"bytes", "input.prompt", "decode them"),
        ([1, {"role": "user", "content": "x"}], "input.prompt", "give one kind"),
        ([{"role": "user"}], "input.chat.messages[0].content", "required"),
        (
            [{"role": "user", "content": "x"}, {"role": "a b", "content": "x"}],
            "input.chat.messages[1].role",
            "pattern",
        ),
        ([{"role": "user", "content": "x", "name": "y"}], "input.chat.messages[0].name", "no such"),
        (["text"], "input.chat.messages[0]", "accepted: a ChatMessage, or a mapping"),
        ([2**32], "input.token_ids.ids", "out of range"),
        ("\ud800", "input.text", "surrogate"),
        (None, "input.prompt", "NoneType; accepted: text, a list of token ids, or a list of chat"),
        (5, "input.prompt", "int; accepted: text"),
        ({"role": "user", "content": "x"}, "input.prompt", "dict; accepted: text"),
        ([], "input.prompt", "an empty list is neither token ids nor a chat"),
        ([{1: "user"}], "input.chat.messages[0].role", "required"),
    ],
)
def test_an_invalid_prompt_is_refused_by_its_field(prompt: Any, field: str, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem) as caught:
        requests.generation_input(prompt, 1, {})
    assert caught.value.field == field


def test_all_values_that_do_not_fit_are_reported_together() -> None:
    with pytest.raises(InvalidRequest) as caught:
        requests.generation_input(
            b"bytes", 2**32, {"stop": "one", "top_logprobs": -1, "stop_token_ids": [-1]}
        )
    assert sorted(field for field, _ in caught.value.violations) == [
        "input.max_new_tokens",
        "input.output.top_logprobs",
        "input.prompt",
        "input.stop",
        "input.stop_token_ids",
    ]


def test_sampling_and_policy_accept_values_and_mappings() -> None:
    by_value = requests.generation_input(
        "x",
        1,
        {
            "sampling": Sampling(temperature=0.0, seed=3),
            "cache_policy": CachePolicy(preset="h2o", budget=8),
        },
    )
    by_mapping = requests.generation_input(
        "x",
        1,
        {
            "sampling": {"temperature": 0.0, "seed": 3},
            "cache_policy": {"preset": "h2o", "budget": 8},
        },
    )
    assert by_value == by_mapping
    without = requests.generation_input("x", 1, {})
    assert without == requests.generation_input("x", 1, {"sampling": {}, "cache_policy": {}})


@pytest.mark.parametrize(
    ("options", "field", "problem"),
    [
        ({"cache_policy": {"preset": "h20"}}, "input.cache_policy.preset", "did you mean h2o"),
        ({"cache_policy": {"bugdet": 3}}, "input.cache_policy.bugdet", "did you mean budget"),
        ({"cache_policy": "h2o"}, "input.cache_policy", "str; accepted: a CachePolicy, or a map"),
        ({"cache_policy": Sampling()}, "input.cache_policy", "Sampling; accepted: a CachePolicy"),
        ({"sampling": {"temperature": -1}}, "input.sampling.temperature", "greater than or equal"),
        ({"sampling": 0.5}, "input.sampling", "float; accepted: a Sampling, or a mapping"),
    ],
)
def test_an_invalid_mapping_is_refused_by_its_field(options: Any, field: str, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem) as caught:
        requests.generation_input("x", 1, options)
    assert caught.value.field == field


def test_the_client_package_has_the_values_and_errors_of_a_call() -> None:
    for name in service.client.__all__:
        assert getattr(service.client, name).__class__ is not None
    assert service.client.CachePolicy is CachePolicy
    assert service.client.Sampling is Sampling
    assert service.client.InvalidArgument is InvalidArgument
    # Every error that the wire gives, but for the kinds of a table's error.
    kinds = {cls for cls in CODES if cls.__base__ is not TableError and cls is not NonFinite}
    assert {cls.__name__ for cls in kinds} <= {*service.client.__all__}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CachePolicy(preset="h20", budget=0), "did you mean h2o.*; budget: .*(got 0)"),
        (lambda: Sampling(temprature=1.0), "temprature: no such field; .*did you mean temperature"),
        (lambda: ChatMessage(role="a b", content="x"), "^role: "),
        (lambda: ChannelOptions(token=5), "^token: "),
        (lambda: Tls(root_ca="here"), "^root_ca: "),
    ],
    ids=["policy", "sampling", "message", "channel", "tls"],
)
def test_invalid_values_raise_invalid_request(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        make()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"min_new_tokens": -1}, "input.min_new_tokens"),
        ({"top_logprobs": -1}, "input.output.top_logprobs"),
        ({"stop_token_ids": [-1]}, "input.stop_token_ids"),
        ({"stop": "one"}, "input.stop"),
        ({"request_id": "\ud800"}, "input.request_id"),
        ({"time_limit_s": math.inf}, "input.time_limit_seconds"),
        ({"time_limit_s": -math.inf}, "input.time_limit_seconds"),
        ({"time_limit_s": math.nan}, "input.time_limit_seconds"),
        ({"time_limit_s": 10**400}, "input.time_limit_seconds"),
    ],
)
def test_an_invalid_option_is_refused_by_its_field(options: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        requests.generation_input("x", 1, options)
    assert caught.value.field == field


def test_a_number_out_of_range_is_refused_with_the_range() -> None:
    with pytest.raises(InvalidArgument, match="-1; accepted: 0 to 4294967295"):
        requests.generation_input("x", -1, {})


def test_a_number_too_large_for_a_float_does_not_become_infinite() -> None:
    """The contract has none yet, and protobuf would not tell."""
    assert FloatValue(value=1e40).value == math.inf
    with pytest.raises(InvalidArgument, match=r"input\.value: 1e\+40 is not a finite number"):
        requests._build(FloatValue, "input.", value=1e40)


@pytest.mark.parametrize("prompt", [[], [1, 2], b"x"])
def test_token_ids_are_not_encoded_again(prompt: Any) -> None:
    with pytest.raises(InvalidArgument, match="prompt: "):
        requests.tokenize_request(prompt)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match=r"temperature; accepted: .*sampling"):
        requests.generation_input("x", 1, {"temperature": 0.0})  # type: ignore[typeddict-unknown-key]
