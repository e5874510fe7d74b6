"""Requests that cannot be served are refused early, with the field and the accepted values."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from a2sf.engine.admission import check
from a2sf.engine.config import EngineConfig
from a2sf.errors import InvalidArgument, ResourceExhausted, TableMismatch
from a2sf.model.loader import LoadedModel, load_model
from a2sf.policy import CachePolicy
from tests.driving import engine_for, request, run, tokens
from tests.tables import make_table
from tests.tiny import BYTES, save_tiny_llama


def test_min_new_tokens_is_refused_if_every_token_ends_the_completion(tmp_path: Any) -> None:
    # Every token of this model ends a completion.
    everything = list(range(BYTES + 2))
    directory = save_tiny_llama(tmp_path, eos_token_id=everything)
    engine = engine_for(load_model(str(directory), device="cpu"))
    with pytest.raises(InvalidArgument, match="all 258 tokens") as caught:
        engine.submit(request("r", (1, 2), ignore_eos=False, min_new_tokens=1))
    assert caught.value.field == "min_new_tokens"
    engine.submit(request("r", (1, 2), ignore_eos=True, min_new_tokens=1))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"min_new_tokens": 21}, "0 to max_new_tokens, 20"),
        ({"top_logprobs": 3}, "set logprobs too"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"time_limit_s": 0.0}, "greater than 0"),
        ({"sampling": {"repetition_penalty": 0.0}}, "greater than or equal to 0.01"),
    ],
)
def test_contradictory_values_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says) as caught:
        request("r", (1, 2), **fields)
    assert caught.value.errors()[0]["loc"][0] in fields


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"prompt_ids": tuple([1] * 512)}, "prompt", "at most 511, because .* context of 512"),
        ({"max_new_tokens": 500, "prompt_ids": (1,) * 20}, "max_new_tokens", "at most 492"),
        ({"prompt_ids": (1, 258)}, "prompt", "0 to 257"),
        ({"stop_token_ids": (999,)}, "stop_token_ids", "0 to 257"),
        (
            {"cache_policy": CachePolicy(alpha=0.5, budget=8, recent=5)},
            "cache_policy.budget",
            r"sinks 4 \+ recent 5",
        ),
        (
            {"cache_policy": CachePolicy(alpha=0.5, budget=129)},
            "cache_policy.budget",
            "at most 128 slots",
        ),
        (
            {"cache_policy": CachePolicy(preset="full"), "max_new_tokens": 200},
            "cache_policy.preset",
            "preset full keeps them all",
        ),
        (
            {"prompt_ids": (1,) * 101, "cache_policy": CachePolicy(preset="h2o", budget=64)},
            "prompt",
            "prefill_chunk",
        ),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_field(
    tiny_model: LoadedModel, fields: dict[str, Any], field: str, says: str
) -> None:
    engine = engine_for(tiny_model, max_prefill_tokens=100)
    made = request("r", (1, 2, 3)).model_copy(update=fields)
    with pytest.raises(InvalidArgument, match=says) as caught:
        engine.submit(made)
    assert caught.value.field == field
    assert not engine.has_work


def test_a_shaped_slab_refuses_policies_with_too_many_slots_for_a_head(
    tiny_model: LoadedModel,
) -> None:
    shares = ((6.0, 2.0), (1.0, 1.0), (1.0, 1.0))
    engine = engine_for(
        tiny_model, slots=60, head_share=shares, default_policy=CachePolicy(alpha=1.0)
    )
    table = make_table(tiny_model.identity, head_share=shares)
    mine = {"table": table, "prompt_ids": (1,) * 200}
    fits = [
        ({}, CachePolicy(preset="h2o", budget=30)),
        (mine, CachePolicy(table=table.name, budget=60)),
        (mine | {"prompt_ids": (1,) * 5}, CachePolicy(table=table.name, budget=30)),
    ]
    for fields, requested_policy in fits:
        engine.submit(
            request("r", (1, 2, 3), cache_policy=requested_policy).model_copy(update=fields)
        )
        run(engine)
    refused = [
        ({}, fits[0][1], "31 tokens in every head; layer 1 head 0 has 30 slots"),
        (mine, fits[1][1], "61 tokens.* gives layer 0 head 0 183 slots; layer 0 head 0 has 180"),
        # A short request keeps all tokens, also in heads with few slots.
        (fits[2][0], fits[2][1], "31 tokens in every head; layer 1 head 0 has 30 slots"),
    ]
    for fields, requested_policy, says in refused:
        more = requested_policy.model_copy(update={"budget": (requested_policy.budget or 0) + 1})
        one = request("r", (1, 2, 3), cache_policy=more).model_copy(update=fields)
        with pytest.raises(InvalidArgument, match=says) as caught:
            engine.submit(one)
        assert caught.value.field == "cache_policy.budget"
        assert "(rows follow head_share); lower budget or raise --slots" in caught.value.problem


def test_a_slab_shaped_for_another_number_of_layers_or_heads_is_refused(
    tiny_model: LoadedModel,
) -> None:
    with pytest.raises(InvalidArgument, match="2 lists; the model has 3 layers"):
        engine_for(tiny_model, head_share=((1.0, 1.0), (2.0, 1.0)))
    with pytest.raises(InvalidArgument, match="1 weights in layer 2; the model has 2 KV heads"):
        engine_for(tiny_model, head_share=((1.0, 1.0), (2.0, 1.0), (1.0,)))


def test_a_prompt_longer_than_the_staging_row_is_served_in_chunks(tiny_model: LoadedModel) -> None:
    engine = engine_for(tiny_model, max_prefill_tokens=40)
    requested_policy = CachePolicy(preset="h2o", budget=24, prefill_chunk=10)
    engine.submit(request("r", range(200), cache_policy=requested_policy))
    assert len(tokens(run(engine)["r"])) == 20


@pytest.mark.parametrize("local_heads", [None, (0, 1), (1, 2)])
def test_all_processes_of_a_model_refuse_the_same_prompts(
    tiny_model: LoadedModel, local_heads: tuple[int, int] | None
) -> None:
    """If only some refused a prompt, the engines would no longer run in lockstep."""
    model = replace(tiny_model, local_heads=local_heads)
    shares = ((1.0, 3.0), (1.0, 1.0), (1.0, 1.0))
    table = make_table(model.identity, head_share=shares, budget=20, prefill_chunk=1)
    one = request("r", range(100), cache_policy=CachePolicy(table=table.name))
    config = EngineConfig(slots=64, max_prefill_tokens=25)
    with pytest.raises(InvalidArgument, match="100 tokens need 45 staging slots"):
        check(one.model_copy(update={"table": table}), model, config)


def test_a_duplicate_request_id_is_refused(tiny_model: LoadedModel) -> None:
    engine = engine_for(tiny_model)
    engine.submit(request("a", (1, 2)))
    with pytest.raises(InvalidArgument, match="already in use"):
        engine.submit(request("a", (1, 2)))


@pytest.mark.parametrize("max_waiting", [0, 2])
def test_a_request_is_refused_if_rows_and_queue_are_full(
    tiny_model: LoadedModel, max_waiting: int
) -> None:
    engine = engine_for(tiny_model, max_batch=2, max_waiting=max_waiting)
    for index in range(2 + max_waiting):
        engine.submit(request(str(index), (1, 2)))
    with pytest.raises(ResourceExhausted, match=f"{2 + max_waiting} wait"):
        engine.submit(request("late", (1, 2)))
    for _ in range(3):
        engine.step()
    with pytest.raises(ResourceExhausted, match=f"2 requests run and {max_waiting} wait"):
        engine.submit(request("late", (1, 2)))
    run(engine)
    engine.submit(request("late", (1, 2)))


def test_a_table_of_another_model_is_refused(tiny_model: LoadedModel) -> None:
    identity = tiny_model.identity.model_copy(update={"fingerprint": "f" * 64})
    table = make_table(identity)
    with pytest.raises(TableMismatch, match="weights differ"):
        engine_for(tiny_model).submit(
            request("r", (1, 2), table=table, cache_policy=CachePolicy(table=table.name))
        )
