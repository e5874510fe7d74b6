"""The profile: against whole runs, written-out sums and differences; and what it proposes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.storages import InMemoryStorage
from scipy import stats
from torch import Tensor

from a2sf import teacher
from a2sf.models import LoadedModel, load_model
from a2sf.policy import EffectivePolicy
from a2sf.schema import UniformSetting
from a2sf.teacher import Example
from tests.tuner.planted import FRAME as PLANTED_FRAME
from tests.tuner.planted import Planted, table, trials_of
from tuner import masked as doubles
from tuner import profile as profiles
from tuner.masked import gradients, masked, walked
from tuner.objective import Objective, effective
from tuner.profile import WEIGHTINGS, Profile, classes, profile, run
from tuner.search import Frame, Setting

FRAME = Frame(num_layers=3, num_kv_heads=2, budget=None, budget_ratio=0.3, prefill_chunk=0)
BASE = Setting(((0.9, 0.5), (0.99, 0.9), (0.5, 0.97)), (1.2, 1.0, 0.8), 0.25, 2)
ALPHAS = (0.0, 0.5, 0.9, 1.0)


def example(length: int, prompt: int, seed: int) -> Example:
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
    return Example(tuple(ids.tolist()), prompt, tuple(range(prompt + 5, length - 1, 2)))


# Of unlike lengths, so that there is padding; more than one of them is prompt for the most part.
EXAMPLES = [example(48, 20, 0), example(40, 31, 1), example(29, 8, 2)]


def policies(model: LoadedModel, setting: Setting, frame: Frame = FRAME) -> list[EffectivePolicy]:
    return [effective(frame.policy(setting), model, len(e.token_ids)) for e in EXAMPLES]


@pytest.fixture(scope="module")
def known(tiny_model_64: LoadedModel) -> Profile:
    return profile(tiny_model_64, EXAMPLES, FRAME, BASE, ALPHAS)


@pytest.mark.parametrize("chunk", [0, 1, 7])
def test_a_walk_with_all_heads_at_one_alpha_tells_what_each_alone_would_give(
    tiny_model_64: LoadedModel, chunk: int
) -> None:
    frame = replace(FRAME, prefill_chunk=chunk)
    base = walked(tiny_model_64, EXAMPLES, policies(tiny_model_64, BASE, frame))
    changed = 0
    for layer in range(3):
        everywhere = policies(tiny_model_64, BASE.with_layer(layer, 0.0), frame)
        seen = base[layer]
        output, kept = teacher.walk(
            tiny_model_64, EXAMPLES, everywhere, layer, seen.projected, seen.scale
        )
        for head in range(2):
            alone = policies(tiny_model_64, BASE.with_head(layer, head, 0.0), frame)
            run_alone = walked(tiny_model_64, EXAMPLES, alone)[layer]
            mine, other = slice(2 * head, 2 * head + 2), slice(2 - 2 * head, 4 - 2 * head)
            for row, one in enumerate(EXAMPLES):
                end = len(one.token_ids)
                torch.testing.assert_close(
                    output[row, mine, :end], run_alone.output[row, mine, :end]
                )
                torch.testing.assert_close(
                    seen.output[row, other, :end], run_alone.output[row, other, :end]
                )
                assert torch.equal(
                    kept[row, head, :end, :end], run_alone.kept[row, head, :end, :end]
                )
            changed += not torch.allclose(output[:, mine], seen.output[:, mine])
    assert changed == 6


@pytest.mark.parametrize("chunk", [0, 1, 7])
def test_plain_attention_to_what_was_kept_gives_the_scans_logits(
    tiny_model_64: LoadedModel, chunk: int
) -> None:
    chosen = policies(tiny_model_64, BASE, replace(FRAME, prefill_chunk=chunk))
    expected = teacher.predict(tiny_model_64, EXAMPLES, chosen)
    full = teacher.predict(tiny_model_64, EXAMPLES, None)
    found, _ = masked(tiny_model_64, EXAMPLES, walked(tiny_model_64, EXAMPLES, chosen))
    for mine, scans, whole in zip(found, expected, full, strict=True):
        torch.testing.assert_close(mine.detach(), scans.logits, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(mine.detach(), whole.logits, atol=0.1)


def nudged(model: LoadedModel, layer: int, by: Tensor) -> list[Tensor]:
    """What each example's probabilities are when a layer's output is moved by `by`."""
    seen = walked(model, EXAMPLES, policies(model, BASE))

    def attend(index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        logits = query @ keys.repeat_interleave(2, dim=1).transpose(-1, -2) * scale
        kept = seen[index].kept.repeat_interleave(2, dim=1)
        weights = logits.exp() * kept
        output = weights / (weights.sum(-1, keepdim=True) + 1e-300)
        output = output @ values.repeat_interleave(2, dim=1)
        return output + by if index == layer else output

    ids = torch.zeros(3, 48, dtype=torch.int64)
    for row, one in enumerate(EXAMPLES):
        ids[row, : len(one.token_ids)] = torch.tensor(one.token_ids)
    hidden = model.hidden_states(ids, torch.arange(48).expand(3, -1), attend)
    return [
        model.logits(hidden[row, list(one.counted)]).softmax(-1) for row, one in enumerate(EXAMPLES)
    ]


def divergences(ps: list[Tensor], qs: list[Tensor]) -> Any:
    """Each example's mean KL in nats."""
    pairs = zip(ps, qs, strict=True)
    return np.array([float((p * (p / q).log()).sum(-1).mean()) for p, q in pairs])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_gradient_is_what_a_nudge_of_one_output_does_to_the_divergence(
    tiny_model_64: LoadedModel, layer: int
) -> None:
    seen = walked(tiny_model_64, EXAMPLES, policies(tiny_model_64, BASE))
    gradient = gradients(tiny_model_64, EXAMPLES, seen).cost[layer]
    nudge = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(3)).double()
    full = [one.logits.softmax(-1) for one in teacher.predict(tiny_model_64, EXAMPLES, None)]
    # Norms are computed in float32 whatever the model is, which smaller steps would drown in.
    step = 1e-3
    up = divergences(full, nudged(tiny_model_64, layer, step * nudge))
    down = divergences(full, nudged(tiny_model_64, layer, -step * nudge))
    predicted = (gradient * nudge).sum(dim=(1, 2, 3)).numpy()
    assert np.abs(predicted).min() > 1e-3
    np.testing.assert_allclose((up - down) / (2 * step), predicted, rtol=5e-3)


def test_the_draws_estimate_how_far_a_nudge_takes_the_model_from_itself(
    tiny_model_64: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubles, "SAMPLES", 300)
    seen = walked(tiny_model_64, EXAMPLES, policies(tiny_model_64, BASE))
    found = gradients(tiny_model_64, EXAMPLES, seen)
    nudge = torch.randn(seen[2].output.shape, generator=torch.Generator().manual_seed(5)).double()
    scores = torch.stack([(draw[2] * nudge).sum(dim=(1, 2, 3)) for draw in found.scores])
    estimated = scores.square().mean(dim=0).numpy() / 2
    step = 0.02
    still = nudged(tiny_model_64, 2, 0 * nudge)
    moved = nudged(tiny_model_64, 2, step * nudge)
    np.testing.assert_allclose(estimated, divergences(still, moved) / step**2, rtol=0.25)


def test_every_weighting_is_the_written_out_sum_over_positions_and_the_group(
    tiny_model_64: LoadedModel, known: Profile
) -> None:
    model = tiny_model_64
    base = walked(model, EXAMPLES, policies(model, BASE))
    found_gradients = gradients(model, EXAMPLES, base)

    def written_out(setting: Setting, layer: int, head: int) -> list[float]:
        seen = walked(model, EXAMPLES, policies(model, setting))[layer]
        query, keys, values = seen.projected
        gradient, draws = found_gradients.cost, found_gradients.scores
        totals = np.zeros(6)
        for row, one in enumerate(EXAMPLES):
            error = squares = effects = future = 0.0
            scores = [0.0] * 3
            for t in range(len(one.token_ids)):
                effect = 0.0
                for h in (2 * head, 2 * head + 1):
                    past = keys[row, head, : t + 1]
                    weights = (past @ query[row, h, t] * seen.scale).softmax(dim=0)
                    off = seen.output[row, h, t] - weights @ values[row, head, : t + 1]
                    error += float(off @ off) / len(one.token_ids)
                    effect += float(off @ gradient[layer][row, h, t])
                    change = seen.output[row, h, t] - base[layer].output[row, h, t]
                    for number, draw in enumerate(draws):
                        scores[number] += float(change @ draw[layer][row, h, t])
                    lost = weights[~seen.kept[row, head, t, : t + 1]].sum()
                    future += float(lost) / len(one.token_ids)
                squares += effect**2
                effects += effect
            second = effects + sum(score**2 for score in scores) / 3 / 2
            totals += [error, squares, effects**2, effects, second, future]
        return list(totals / len(EXAMPLES))

    for layer, head, at in [(0, 1, 0), (1, 0, 2), (2, 0, 3), (2, 1, 1)]:
        changed = written_out(BASE.with_head(layer, head, ALPHAS[at]), layer, head)
        before = written_out(BASE, layer, head)
        expected = np.array(changed) - np.array(before)
        found = [known.costs[name][layer, head, at] for name in WEIGHTINGS]
        assert np.abs(expected).min() > 1e-9
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_the_bases_own_alpha_costs_nothing_more_and_others_differ(known: Profile) -> None:
    for costs in known.costs.values():
        assert costs.shape == (3, 2, 4)
        for layer, head in np.ndindex(3, 2):
            if BASE.alpha[layer][head] in ALPHAS:
                own = ALPHAS.index(BASE.alpha[layer][head])
                assert costs[layer, head, own] == pytest.approx(0.0, abs=1e-12)
        assert np.count_nonzero(np.abs(costs) > 1e-9) > 12


def test_examples_profiled_in_several_batches_come_to_the_same(
    tiny_model_64: LoadedModel, known: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "BATCH", 2)
    apart = profile(tiny_model_64, EXAMPLES, FRAME, BASE, ALPHAS)
    for name in WEIGHTINGS:
        np.testing.assert_allclose(apart.costs[name], known.costs[name], rtol=1e-5, atol=1e-10)
    assert apart.evaluations == known.evaluations == 11 + 4


def test_nothing_costs_anything_where_nothing_is_evicted(tiny_model_64: LoadedModel) -> None:
    roomy = replace(FRAME, budget=48, budget_ratio=None)
    seen = walked(tiny_model_64, EXAMPLES, policies(tiny_model_64, BASE, roomy))
    assert seen[0].kept[0].all(dim=0).equal(torch.ones(48, 48).tril().bool())
    found = profile(tiny_model_64, EXAMPLES, roomy, BASE, ALPHAS)
    for costs in found.costs.values():
        assert np.abs(costs).max() < 1e-12


def test_both_orders_predict_the_measured_change_where_effects_are_small(
    tiny_model_dir: Path,
) -> None:
    model = load_model(str(tiny_model_dir), device="cpu", dtype="float64")
    # The last layer whispers: what it loses moves the logits a little, and evicts nothing above.
    model.module.get_decoder().layers[2].self_attn.o_proj.weight.mul_(0.01)
    costs = profile(model, EXAMPLES, FRAME, BASE, ALPHAS).costs
    objective = Objective(model, EXAMPLES, label="test")
    base = objective.cost(FRAME.policy(BASE)).mean
    measured = np.array(
        [
            [objective.cost(FRAME.policy(BASE.with_head(2, head, a))).mean - base for a in ALPHAS]
            for head in range(2)
        ]
    )
    assert np.ptp(measured) > 1e-4
    for name in ("first_order", "second_order"):
        found = costs[name][2]
        assert stats.pearsonr(found.ravel(), measured.ravel()).statistic > 0.99
        assert np.abs(found - measured).max() < 0.1 * np.abs(measured).max()


def test_a_packed_model_is_refused_for_its_gradients_would_be_wrong(
    tiny_model: LoadedModel, tiny_model_dir: Path
) -> None:
    with pytest.raises(AssertionError, match="pack=False"):
        profile(tiny_model, EXAMPLES, FRAME, BASE, ALPHAS)
    unpacked = load_model(str(tiny_model_dir), device="cpu", dtype="float32", pack=False)
    found = profile(unpacked, EXAMPLES[:1], FRAME, BASE, ALPHAS)
    assert np.isfinite(found.costs["first_order"]).all()


def test_a_profile_comes_back_from_json_as_it_was(known: Profile) -> None:
    text = json.dumps(known.document(), allow_nan=False)
    back = Profile.of(json.loads(text))
    assert (back.base, back.alphas, back.evaluations) == (BASE.alpha, ALPHAS, 15.0)
    assert list(back.costs) == list(WEIGHTINGS)
    for name in WEIGHTINGS:
        assert back.costs[name].dtype == np.float64
        np.testing.assert_array_equal(back.costs[name], known.costs[name])
        assert all(float(f"{v:.6g}") == v for v in known.costs[name].ravel())


def made(**costs: list[list[list[float]]]) -> Profile:
    arrays = {name: np.array(values) for name, values in costs.items()}
    return Profile(table((0.9, 0.9), (0.9, 0.9), (0.9, 0.9)).alpha, (0.0, 0.5, 1.0), arrays, 8.0)


FALLING = [[3.0, 1.0, -2.0], [1.0, -1.0, 1.0]], [[0.5, 0.1, 0.2], [-5.0, 1.0, 0.0]]
LAST = [[-1e-3, 1.0, 1.0], [4.0, 0.0, 5.0]]
PLAIN = made(
    output_error=[*FALLING, LAST], fisher=[*FALLING, LAST], future_mass=[[[1.0, 1.0, 1.0]] * 2] * 3
)


def test_heads_go_where_they_gain_and_the_half_only_where_most_is_gained() -> None:
    base = table((0.9, 0.9), (0.9, 0.9), (0.9, 0.9))
    whole, half = PLAIN.proposals(base)
    # Of equal origins one setting; where nothing is gained a head stays, and the base is no news.
    assert whole.origins == ("output_error", "fisher")
    assert half.origins == ("output_error/half", "fisher/half")
    assert whole.setting == table((1.0, 0.5), (0.9, 0.0), (0.0, 0.9))
    assert half.setting == table((1.0, 0.5), (0.9, 0.0), (0.9, 0.9))


def test_proposals_are_settings_that_make_policies(known: Profile) -> None:
    proposals = known.proposals(BASE)
    assert len(proposals) > 3
    assert len({p.setting for p in proposals}) == len(proposals)
    for proposal in proposals:
        assert FRAME.policy(proposal.setting).layer_share == BASE.layer_share
        assert proposal.setting == Setting.of(json.loads(json.dumps(proposal.setting.point())))
        assert set(sum(proposal.setting.alpha, ())) <= {*ALPHAS, *sum(BASE.alpha, ())}


def test_heads_of_one_shape_are_of_one_class_whatever_their_size() -> None:
    rising, falling, bent = (np.array(v) for v in ([0.0, 1, 2], [0.0, -1, -2], [0.0, 3, 0.1]))
    costs = np.array([[rising, 50 * falling], [7 * falling, bent], [0.1 * bent, 1e-6 * rising]])
    found = classes(made(fisher=costs.tolist()), 3)
    assert found == classes(made(fisher=costs.tolist()), 3)
    assert found[0][0] == found[2][1]
    assert found[0][1] == found[1][0]
    assert found[1][1] == found[2][0]
    assert {index for row in found for index in row} == {0, 1, 2}
    assert classes(made(fisher=costs.tolist()), 1) == [[0, 0]] * 3


def test_heads_without_any_cost_are_a_class_like_others() -> None:
    assert classes(made(fisher=[[[0.0, 0.0, 0.0]] * 2] * 3), 4) == [[0, 0]] * 3


def test_a_stage_profiles_once_for_all_workers_and_keeps_what_each_proposal_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = PLANTED_FRAME.uniform(UniformSetting(alpha=0.9, recent_share=0.25, sinks=4))
    good = table((1.0, 0.5), (0.9, 0.0), (0.9, 0.9))
    asked: list[Any] = []

    def profiled(*arguments: Any) -> Profile:
        asked.append(arguments)
        return PLAIN

    monkeypatch.setattr(profiles, "profile", profiled)
    storage = InMemoryStorage()
    found = []
    for _ in range(2):
        planted = Planted(good, spread=0.0)
        trials = trials_of(planted, storage)
        with trials.stage("start", 1):
            (first,) = trials.measure("start", [start])
        with trials.stage("profile", 10):
            found.append(run(trials, first, lambda: "model"))  # type: ignore[arg-type, return-value]
        assert trials.accounts["profile"].trials == 2
        # The profile's own eight, and each of the two.
        assert trials.accounts["profile"].evaluations == pytest.approx(10, abs=1)
    assert len(asked) == 1
    assert asked[0][0] == "model"
    assert asked[0][3] == start
    assert [one.best.setting for one in found] == [good, good]
    sources = {proposal.origins[0]: tried for proposal, tried in found[1].tried}
    assert sources.keys() == {"output_error", "output_error/half"}
    assert sources["output_error/half"].mean < sources["output_error"].mean


def test_a_stage_keeps_the_best_where_no_proposal_is_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = PLANTED_FRAME.uniform(UniformSetting(alpha=0.9, recent_share=0.25, sinks=4))
    monkeypatch.setattr(profiles, "profile", lambda *_: PLAIN)
    trials = trials_of(Planted(start, own=0.01))
    with trials.stage("start", 1):
        (first,) = trials.measure("start", [start])
    with trials.stage("profile", 1):
        found = run(trials, first, lambda: "model")  # type: ignore[arg-type, return-value]
    assert found.best is first
    # One trial was left, so one of the two proposals was tried.
    assert len(found.tried) == 1
