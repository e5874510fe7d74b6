"""Policies as they are written on a command line."""

from pathlib import Path

import pytest

from a2sf.errors import InvalidArgument, NotFound, TableMismatch
from a2sf.model.loader import LoadedModel
from a2sf.policy import CachePolicy
from a2sf.schema import TablePolicy
from a2sf.tablefile import save_table
from tests.tables import make_table
from tuner.evaluation import policy_specs
from tuner.evaluation.objective import effective
from tuner.evaluation.results import Size
from tuner.evaluation.slot_rules import AdaKV, Pyramid


@pytest.mark.parametrize(
    ("written", "requested_policy"),
    [
        ("full", CachePolicy(preset="full")),
        ("window", CachePolicy(preset="window", sinks=4)),
        ("h2o:0", CachePolicy(preset="h2o", sinks=0)),
        ("tova_per_head", CachePolicy(preset="tova_per_head", recent=0, sinks=4)),
        ("random", CachePolicy(preset="random", recent_share=0.5, sinks=4)),
        ("random:0:2", CachePolicy(preset="random", recent=0, sinks=2)),
        ("a2sf:.9", CachePolicy(alpha=0.9, recent_share=0.5, sinks=4)),
        ("a2sf:0:8", CachePolicy(alpha=0.0, recent=8, sinks=4)),
        ("a2sf:1:.25:0", CachePolicy(alpha=1.0, recent_share=0.25, sinks=0)),
        ("pyramid", CachePolicy(alpha=1.0, recent_share=0.5, sinks=4)),
        ("pyramid:.98:.25", CachePolicy(alpha=0.98, recent_share=0.25, sinks=4)),
    ],
)
def test_a_policy_string_is_parsed_to_its_fields(
    tiny_model: LoadedModel, written: str, requested_policy: CachePolicy
) -> None:
    (found,) = policy_specs.parse(written, tiny_model)
    assert (found.name, found.requested_policy) == (written, requested_policy)
    assert found.has_size == (written != "full")


def test_a_bare_a2sf_is_several_alphas(tiny_model: LoadedModel) -> None:
    found = policy_specs.parse("window, a2sf", tiny_model)
    assert {policy.requested_policy.alpha for policy in found[1:]} == {
        0.0,
        0.5,
        0.9,
        0.98,
        0.99,
        1.0,
    }
    assert {
        policy.requested_policy.recent_share or policy.requested_policy.recent
        for policy in found[1:]
    } == {0, 0.5}
    assert len(found) == 13


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "none given; accepted: full; window"),
        ("snapkv", "'snapkv'; accepted: full; window"),
        ("full:3", "'full:3'; accepted"),
        ("h2o:x", "'x' is not a number"),
        ("a2sf:1.5", "1.5; accepted: 0 to 1"),
        ("a2sf:nan", "nan; accepted: 0 to 1"),
        ("random:-1", "-1; accepted"),
        ("h2o,h2o", "'h2o' is given twice"),
        ("a2sf,a2sf", "'a2sf' is given twice"),
        ("a2sf,a2sf:.9:0", "'a2sf' stands for several settings and contains 'a2sf:.9:0'"),
        ("a2sf:.5:.5:4:9", "accepted: full"),
        ("../mathqa", "accepted: full"),
    ],
)
def test_unreadable_policies_are_refused_with_the_accepted_forms(
    tiny_model: LoadedModel, written: str, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        policy_specs.parse(written, tiny_model)
    assert message in str(caught.value)


def test_a_table_keeps_all_but_its_own_budget(tiny_model: LoadedModel, tmp_path: Path) -> None:
    table = make_table(tiny_model.identity)
    save_table(table, tmp_path / "mine.json")
    (found,) = policy_specs.parse(str(tmp_path / "mine.json"), tiny_model)
    assert found.name == table.name
    assert found.fitted_at == Size(slots=table.policy.budget)
    at = found.at(Size(ratio=0.5), prefill_chunk=7, seed=0)
    assert isinstance(at, TablePolicy)
    assert at == table.policy.model_copy(update={"budget": None, "budget_ratio": 0.5})
    settled = effective(at, tiny_model, 100)
    assert (settled.budget, settled.alpha) == (50, table.policy.alpha)


def test_a_pyramid_has_the_requested_size_and_prompt_block(
    tiny_model: LoadedModel,
) -> None:
    (found,) = policy_specs.parse("pyramid:.9", tiny_model)
    at = found.at(Size(ratio=0.4), prefill_chunk=7, seed=0)
    assert at == Pyramid(
        equal=found.requested_policy.model_copy(update={"budget_ratio": 0.4, "prefill_chunk": 7})
    )
    assert "as PyramidKV splits them, uniform alpha 0.9" in found.description


def test_adakv_has_the_requested_size_and_prompt_block(
    tiny_model: LoadedModel,
) -> None:
    (found,) = policy_specs.parse("adakv:.9", tiny_model)
    at = found.at(Size(slots=30), prefill_chunk=7, seed=0)
    assert at == AdaKV(
        equal=found.requested_policy.model_copy(update={"budget": 30, "prefill_chunk": 7})
    )
    assert "as AdaKV splits them at the end of each prompt" in found.description


def test_a_table_of_another_model_and_a_missing_file_are_refused(
    tiny_model: LoadedModel,
) -> None:
    with pytest.raises(TableMismatch):
        policy_specs.parse("mathqa", tiny_model)
    with pytest.raises(NotFound, match=r"alpha table /nowhere/x\.json"):
        policy_specs.parse("/nowhere/x.json", tiny_model)


def test_the_shipped_table_is_known_by_its_name(reference_model: LoadedModel) -> None:
    (found,) = policy_specs.parse("mathqa", reference_model)
    assert found.table is not None
    assert found.table.name == "mathqa"


@pytest.mark.parametrize(
    "written", ["full", "window", "h2o", "tova_per_head", "random", "a2sf:.9", "pyramid", "adakv"]
)
def test_every_description_names_the_protected_tokens(
    tiny_model: LoadedModel, written: str
) -> None:
    (found,) = policy_specs.parse(written, tiny_model)
    assert ("sinks 4" in found.description) == (written != "full")


def test_the_seed_and_the_prompt_block_reach_the_policy(tiny_model: LoadedModel) -> None:
    (found,) = policy_specs.parse("random", tiny_model)
    at = found.at(Size(slots=20), prefill_chunk=3, seed=9)
    settled = effective(at, tiny_model, 100)
    assert (settled.budget, settled.random_seed, settled.prefill_chunk) == (20, 9, 3)
