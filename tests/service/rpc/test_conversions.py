"""Values survive the wire."""

from hypothesis import given
from hypothesis import strategies as st

from a2sf.errors import InvalidRequest
from a2sf.model.loader import LoadedModel
from a2sf.policy import PRESETS, CachePolicy, EffectivePolicy
from a2sf.requests import Sampling, Started
from a2sf.tablefile import parse_table
from service.backend.tables import TableStore
from service.client import requests as client_requests
from service.client import responses as client_responses
from service.client.results import StreamStarted
from service.pb import inference_pb2 as pb
from service.policy_messages import policy_from_message, policy_to_message
from service.rpc.conversions import descriptions, requests, responses
from tests.tables import make_table

share = st.floats(0.0, 1.0, allow_subnormal=False)
count = st.integers(0, 2**31 - 1)


@st.composite
def policies(draw: st.DrawFn) -> CachePolicy:
    """Every policy that is not a contradiction."""
    fields = {
        **draw(
            st.one_of(
                st.just({}),
                st.fixed_dictionaries({"preset": st.sampled_from(PRESETS)}),
                st.fixed_dictionaries({"table": st.text(min_size=1, max_size=9)}),
                st.fixed_dictionaries({"alpha": share}),
            )
        ),
        **draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "budget": st.integers(1, 2**31),
                    "recent": count,
                    "sinks": count,
                    "min_budget": count,
                    "prefill_chunk": count,
                    "random_seed": count,
                },
            )
        ),
    }
    try:
        return CachePolicy(**fields)
    except InvalidRequest:
        return CachePolicy(budget_ratio=0.5, recent_share=fields.get("alpha", 0.0))


@given(policies())
def test_a_policy_survives_the_round_trip(policy: CachePolicy) -> None:
    sent = pb.CachePolicy.FromString(policy_to_message(policy).SerializeToString())
    assert policy_from_message(sent) == policy


@given(
    st.builds(
        Sampling,
        repetition_penalty=st.floats(0.01, 100.0),
        temperature=st.floats(0.0, 100.0),
        top_k=count,
        top_p=st.floats(0.0, 1.0, exclude_min=True),
        min_p=share,
        seed=st.none() | st.integers(0, 2**63 - 1),
    )
)
def test_the_engine_gets_what_the_client_requested(
    tiny_model: LoadedModel, sampling: Sampling
) -> None:
    message = client_requests.generation_input(
        [1, 2], 3, {"sampling": sampling, "stop": ["a"], "stop_token_ids": [0], "ignore_eos": True}
    )
    sent = pb.GenerationInput.FromString(message.SerializeToString())
    assert tuple(sent.token_ids.ids) == (1, 2)
    request, _ = requests.read_request(
        sent, TableStore(), tiny_model, request_id="r", max_prompt_bytes=0
    )
    assert request.sampling == sampling
    assert (request.stop, request.stop_token_ids, request.ignore_eos) == (("a",), (0,), True)


def test_a_tables_typed_fields_equal_its_json(tiny_model: LoadedModel) -> None:
    shares = ((0.25, 0.75), (5.0, 1.0), (1.0, 1.0))
    table = make_table(tiny_model.identity, budget=None, budget_ratio=0.25, head_share=shares)
    message = descriptions.table_message(table)
    assert parse_table(message.canonical_json.encode()) == table
    typed = message.table
    assert tuple(tuple(layer.alphas) for layer in typed.layers) == table.policy.alpha
    assert tuple(tuple(layer.shares) for layer in typed.head_share) == shares
    assert tuple(typed.layer_share) == (0.5, 3.0, 1.0)
    assert typed.WhichOneof("budget_choice") == "budget_ratio"
    assert (typed.budget_ratio, typed.recent, typed.sinks) == (0.25, 4, 2)
    assert typed.summary.sha256 == table.sha256
    assert typed.summary.created_at.ToSeconds() == int(table.created_at.timestamp())
    assert typed.model.fingerprint == table.model.fingerprint


heads = st.lists(
    st.lists(st.tuples(st.integers(1, 2**31 - 1), count), min_size=2, max_size=2),
    min_size=1,
    max_size=5,
)


def test_a_table_lists_head_budgets_with_small_shares_raised(
    tiny_model: LoadedModel,
) -> None:
    shares = ((9.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    table = make_table(tiny_model.identity, budget=14, head_share=shares, sinks=2, recent=5)
    observed = descriptions.table_message(table).table
    # Of 84 slots: 6 would be each small share's, and 8 are what a head needs.
    assert [list(layer.tokens) for layer in observed.head_budgets] == [[44, 8], [8, 8], [8, 8]]
    crowded = make_table(tiny_model.identity, budget=7, sinks=2, recent=5)
    assert not descriptions.table_message(crowded).table.head_budgets


@given(heads)
def test_the_budget_and_window_of_each_head_reach_the_client(
    tiny_model: LoadedModel, layers: list[list[tuple[int, int]]]
) -> None:
    policy = EffectivePolicy(
        method="table",
        alpha=((0.5, 1.0),) * len(layers),
        budget=7,
        head_budgets=tuple(tuple(budget for budget, _ in layer) for layer in layers),
        recent=3,
        head_recents=tuple(tuple(recent for _, recent in layer) for layer in layers),
        sinks=1,
        prefill_chunk=0,
        table_name="made-up",
        table_sha256="0" * 64,
    )
    event = Started(request_id="r", policy=policy, prompt_tokens=5, seed=0)
    answer = responses.ResponseBuilder(
        pb.OutputOptions(), requests.EncodedPrompt("x", (1,)), tiny_model
    )
    message = answer.stream_response(event)
    sent = pb.StreamGenerateResponse.FromString(message.SerializeToString())
    read = client_responses.stream_event(sent, "r")
    assert isinstance(read, StreamStarted)
    assert (read.head_budgets, read.head_recents) == (policy.head_budgets, policy.head_recents)
    assert (read.budget, read.recent) == (7, 3)


def test_a_response_with_only_layer_slots_is_understood(tiny_model: LoadedModel) -> None:
    identity = descriptions.identity_message(tiny_model.identity)
    observed = pb.GetModelResponse(model=identity, layer_slots=[40, 8, 8])
    observed.default_cache_policy.preset = pb.CACHE_PRESET_H2O
    assert client_responses.model_description(observed).head_slots == (
        (40, 40),
        (8, 8),
        (8, 8),
    )
