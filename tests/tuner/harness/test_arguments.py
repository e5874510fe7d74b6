"""Model arguments: their checks, and their policy for sequences of any length."""

from pathlib import Path

import pytest

from a2sf.errors import A2SFError, InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.tablefile import save_table
from tests.tables import make_table
from tests.tuner.harness.asking import harness_model, likelihoods
from tuner.harness.arguments import Arguments, SequencePolicies
from tuner.harness.model import HarnessModel


def test_a_minimum_budget_does_not_raise_the_ratio_of_a_table(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    ratio = {"budget": None, "budget_ratio": 0.2, "min_budget": 64}
    save_table(make_table(tiny_model.identity, **ratio), tmp_path / "floor.json")
    given = {"pretrained": "tiny", "policy": str(tmp_path / "floor.json")}
    assert SequencePolicies(Arguments.read(given), tiny_model).at(100).budget == 20
    asked = SequencePolicies(Arguments.read({**given, "ratio": 0.3}), tiny_model)
    assert asked.at(100).budget == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefil_chunk": 1}, r"prefil_chunk: unknown; accepted: pretrained, .*prefill_chunk"),
        ({"pretrained": None}, r"pretrained: None; .*string"),
        ({"pretrained": "no such model"}, r"no such directory"),
        ({"policy": "h3o", "ratio": 0.5}, r"policy: 'h3o'; accepted: full; window"),
        ({"policy": "h2o,window", "ratio": 0.5}, r"policy: .* is 2 policies; accepted: one"),
        ({"policy": "a2sf", "ratio": 0.5}, r"policy: 'a2sf' is \d+ policies; accepted: one"),
        (
            {"policy": "adakv", "ratio": 0.5},
            r"policy: 'adakv' splits slots by a rule that no server has",
        ),
        ({"policy": "pyramid", "ratio": 0.5}, r"policy: 'pyramid' splits .* tuner evaluate"),
        ({"policy": "h2o"}, r"ratio: policy h2o takes one of ratio and slots; got 0"),
        ({"policy": "h2o", "ratio": 0.5, "slots": 9}, r"takes one of ratio and slots; got 2"),
        ({"slots": 9}, r"policy: full keeps every token; leave ratio and slots out"),
        ({"policy": "h2o", "ratio": "1.5"}, r"ratio: '1.5'; .*less than or equal to 1"),
        ({"batch_size": "many"}, r"batch_size: 'many'; .*integer"),
        ({"max_length": 4096}, r"max_length: 4096; accepted: up to 1024"),
        ({"device": "tpu"}, r"device: 'tpu'; accepted: auto, cpu"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_accepted(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(A2SFError, match=message):
        harness_model(**arguments)


def test_a_sequence_too_short_for_its_policy_is_reported_with_its_length() -> None:
    model = harness_model(policy="a2sf:.9", ratio=0.2)
    words = r"a sequence has 4 tokens; budget_ratio 0\.2 of 4 tokens is 1 tokens, "
    with pytest.raises(InvalidArgument, match=words):
        likelihoods(model, [("a", " b c")])


def test_model_arguments_take_precedence_over_the_harness_flags() -> None:
    flags = {"batch_size": "auto", "max_batch_size": None, "device": "cuda:0"}
    made = HarnessModel.create_from_arg_string("pretrained=reference,policy=h2o,ratio=.2", flags)
    assert made.batch_size == 32
    assert made.policies.requested_policy.budget_ratio == 0.2
    own = HarnessModel.create_from_arg_obj(
        {"pretrained": "reference", "batch_size": 3, "device": "cpu"}, flags
    )
    assert own.batch_size == 3
