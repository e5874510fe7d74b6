"""A walk in one launch equals the law: visible tokens, outputs, and scores afterwards.

Without a CUDA device the programs run in Triton's interpreter on the processor.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")

from a2sf.cache.kernels import (
    decode,
    decode_programs,
    score_update,
    triton_walk,
    triton_walk_programs,
)
from a2sf.cache.kernels.triton_walk import HeadSlots
from a2sf.cache.scoring import EMPTY
from tests import row_cases
from tests.head_slots import head_of
from tests.interpreting import DEVICE, interpreting, poisoned
from tests.triton_walk_cases import Case, check, make, random_case, served_case


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with interpreting(score_update, decode_programs, triton_walk_programs):
        yield


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned() -> Iterator[None]:
    """Fill the result of `torch.empty` with NaN, to detect unwritten memory."""
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tiles so small that heads with tens of slots take several."""
    monkeypatch.setattr(decode, "TILE_BYTES", 1)
    monkeypatch.setattr(triton_walk, "SCORE_BLOCK", 32)


@pytest.mark.parametrize("seed", range(16))
def test_a_walk_equals_the_law_written_out(seed: int) -> None:
    check(random_case(seed), written=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(16, 60))
def test_any_walk_equals_the_law_written_out(seed: int) -> None:
    check(random_case(seed), written=True)


def test_a_walk_with_served_shapes_equals_the_law() -> None:
    check(served_case(0, most=16))


@pytest.mark.parametrize("unequal", [False, True])
def test_a_long_walk_evicts_the_same_tokens_as_the_law(unequal: bool) -> None:
    case = make(7, most=40, unequal=unequal, rows=2, slots=(9, 20), seen=3)
    assert check(case, written=True) == 0
    assert int((case.end - case.start).max()) == 40


def test_a_walk_with_a_wrong_law_is_detected() -> None:
    case = make(7, rows=2, slots=(9, 20), methods=("a2sf",), seen=20)
    walk = case.walk

    def other(*, recorded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        right = case.policy
        case.policy = replace(right, alpha=right.alpha * 0.7)
        found = walk(recorded=recorded)
        case.policy = right
        return found

    case.walk = other  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        check(case)


def test_recording_does_not_change_results() -> None:
    twins = [make(11, most=6, unequal=True, rows=2, slots=(5, 20)) for _ in range(2)]
    (output, visible), (same, none) = (
        case.walk(recorded=recorded) for case, recorded in zip(twins, (True, False), strict=True)
    )
    assert visible is not None
    assert none is None
    torch.testing.assert_close(output, same, rtol=0, atol=0, equal_nan=True)
    for name in ("keys", "values", "position", "score"):
        one, other = (getattr(case.slots, name) for case in twins)
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_memory_outside_the_slots_does_not_change() -> None:
    case = make(13, unequal=True, rows=3, slots=(2, 12), seen=30)
    owned = torch.zeros_like(case.slots.score, dtype=torch.bool)
    used = torch.zeros(len(case.slots.keys), dtype=torch.bool, device=DEVICE)
    for row, head in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        width = int(case.slots.width[row, head])
        marks, vectors = int(case.slots.marks[row, head]), int(case.slots.vectors[row, head])
        owned[marks : marks + width] = True
        used[vectors : vectors + width] = True
    case.walk(recorded=False)
    assert (case.slots.position[~owned] == EMPTY).all()
    assert case.slots.score[~owned].isnan().all()
    assert case.slots.keys[~used].isnan().all()
    assert case.slots.values[~used].isnan().all()
    assert not case.slots.score[owned].isnan().any()


def test_a_row_without_tokens_does_not_change() -> None:
    case = make(5, rows=3, slots=(4, 12), seen=20)
    case.end = torch.stack([case.start[0], case.start[1] + 3, case.start[2] - 2])
    before = case.slots.position.clone(), case.slots.score.clone()
    output, _ = case.walk(recorded=False)
    for row in (0, 2):
        assert output[row].isnan().all()
        assert torch.equal(case.slots.position[row], before[0][row])
        torch.testing.assert_close(
            case.slots.score[row], before[1][row], rtol=0, atol=0, equal_nan=True
        )
    assert not torch.equal(case.slots.position[1], before[0][1])


def test_on_a_tie_the_oldest_token_is_evicted_first() -> None:
    case = make(3, rows=1, kv_heads=1, slots=(20, 20), methods=("a2sf",), seen=20, most=4)
    slots, policy = case.slots, case.policy
    policy.alpha.fill_(1.0)
    policy.sinks.fill_(2)
    policy.recent.fill_(10)
    slots.score.fill_(0.25)
    # Equal keys get equal attention, in sums that are exact.
    for keys in (slots.keys, case.keys):
        keys.fill_(1.0)
    case.query.fill_(0.5)
    _, visible = case.walk(recorded=True)
    assert visible is not None
    given = [set(visible[0, 0, at].nonzero().flatten().tolist()) for at in range(20, 24)]
    everyone = set(range(20))
    assert [everyone - one for one in given] == [{2}, {2, 3}, {2, 3, 4}, {2, 3, 4, 5}]


def test_a_head_needs_no_more_slots_than_its_tokens() -> None:
    # A budget of 100, but memory for only ten tokens.
    case = make(5, rows=2, kv_heads=2, slots=(20, 20), methods=("a2sf",), seen=0, most=10)
    case.policy.budget.fill_(100)
    case.policy.recent.fill_(0)
    narrow = replace(case.slots, width=torch.full_like(case.slots.width, 10), widest=10)
    case.slots = narrow
    check(case)


class Launched:
    """Records the launches of a program."""

    def __init__(self, program: object) -> None:
        self.program = program
        self.order: list[list[int]] = []

    def __getitem__(self, grid: tuple[int]) -> object:
        def launch(*arguments: torch.Tensor, **constants: object) -> None:
            self.order.append(arguments[11].tolist())
            self.program[grid](*arguments, **constants)  # type: ignore[index]

        return launch


def test_a_layer_is_one_launch_and_the_heads_with_the_most_work_start_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = Launched(triton_walk_programs.walk)
    monkeypatch.setattr(triton_walk_programs, "walk", launched)
    case: Case = make(2, unequal=True, rows=3, slots=(2, 30), seen=40, most=6)
    case.end = case.start + torch.tensor([6, 2, 6], device=DEVICE)
    case.walk(recorded=False)
    (order,) = launched.order
    budgets = case.policy.budget.flatten().tolist()
    work = [budgets[pair] * (6, 2, 6)[pair // 2] for pair in order]
    assert sorted(order) == list(range(6))
    assert work == sorted(work, reverse=True)
    assert len(set(work)) > 2


def test_head_slots_are_views_of_the_cache() -> None:
    drawn = row_cases.make(1, rows=2, kv_heads=2, layers=2, slots=(5, 9), seen=9)
    slots = HeadSlots.of(drawn.slots, 1)
    for row, head in itertools.product(range(2), range(2)):
        mine = head_of(drawn.slots, 1, row, head)
        assert int(slots.width[row, head]) == len(mine.position)
        for vectors, theirs in ((slots.keys, mine.keys), (slots.values, mine.values)):
            first = vectors.storage_offset() + int(slots.vectors[row, head]) * vectors.shape[2]
            assert first == theirs.storage_offset()
        for marks, their_marks in ((slots.position, mine.position), (slots.score, mine.score)):
            first = marks.storage_offset() + int(slots.marks[row, head])
            assert first == their_marks.storage_offset()
