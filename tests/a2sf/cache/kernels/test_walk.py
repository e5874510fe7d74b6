"""numba's kernels equal `DecodePass`: outputs, scores, positions and victims."""

import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from a2sf.cache import scoring
from a2sf.cache.kernels import walk, walk_programs
from a2sf.cache.kernels.walk import Walker
from a2sf.cache.passes import DecodePass
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.retention import RetentionRecorder
from a2sf.cache.slots import Slots
from a2sf.engine import decoding
from a2sf.policy import EffectivePolicy
from tests.head_slots import head_of
from tests.interpreting import CUDA
from tests.row_cases import TOLERANCE, Case, check_state, exact, make, owned

pytestmark = pytest.mark.skipif(CUDA, reason="rows are drawn on the CUDA device")

CPU = torch.device("cpu")
SCORE_TOLERANCE = 2e-5


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use two threads even for little work."""
    monkeypatch.setattr(walk, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def any_case(seed: int) -> Case:
    choose = random.Random(seed)
    return make(
        seed,
        group=choose.choice([1, 2, 3, 4, 7, 8]),
        dim=choose.choice([8, 32, 64, 80, 96, 128, 256]),
        dtype=choose.choice([torch.float32, torch.bfloat16]),
        rows=choose.randint(1, 3),
        kv_heads=choose.randint(1, 3),
        layers=choose.choice([1, 1, 2]),
        slots=(1, 6) if choose.random() < 0.3 else (1, 80),
        scored=choose.random() < 0.85,
        same_keys=choose.random() < 0.2,
    )


def close(output: torch.Tensor, want: torch.Tensor) -> None:
    assert output.shape == want.shape
    most = TOLERANCE[output.dtype] * float(want.abs().max())
    torch.testing.assert_close(output.double(), want, rtol=0, atol=most)


def check_steps(case: Case, steps: int) -> None:
    """Decode some steps; compare each with the reference's step from the same state."""
    slots, policy, start = case.slots, case.policy, case.start.clone()
    walker = Walker(slots, policy)
    for _ in range(steps):
        witness = exact(slots)
        reference = DecodePass(witness, policy, start)
        walker.begin(start)
        for layer in range(len(slots.keys)):
            tokens = case.tokens()
            output = walker(layer, *tokens, case.scale)
            assert output.dtype == slots.keys[0].dtype
            close(output, reference(layer, *(t.double() for t in tokens), case.scale))
        start += 1
        # Scores are compared if evictions depend on them, or if they come from a hash.
        judged = policy.scored | (policy.random_seed >= 0)
        check_state(case, witness, start, judged, SCORE_TOLERANCE)


@pytest.mark.parametrize("seed", range(40))
def test_a_step_equals_the_reference(seed: int) -> None:
    check_steps(any_case(seed), 3)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("seed", range(40, 50))
def test_a_step_in_two_threads_equals_the_reference(seed: int) -> None:
    check_steps(any_case(seed), 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(50, 200))
def test_any_step_equals_the_reference(seed: int) -> None:
    check_steps(any_case(seed), 5)


def texts(case: Case, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of texts, in the memory layout of a model's projections."""
    heads, dim = case.policy.alpha.shape[2], case.slots.keys[0].shape[2]

    def normal(count: int) -> torch.Tensor:
        drawn = torch.randn(len(case.start), tokens, count, dim, generator=case.rng)
        return drawn.to(case.slots.keys[0].dtype).transpose(1, 2)

    return normal(heads * case.group), normal(heads), normal(heads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("seed", range(30))
def test_a_walk_along_texts_of_different_lengths_equals_single_steps(seed: int) -> None:
    choose = random.Random(seed)
    dtype = choose.choice([torch.float32, torch.bfloat16])
    case = make(
        seed, group=choose.choice([1, 3, 4]), dim=16, dtype=dtype, seen=choose.choice([0, 7, 19])
    )
    start, side = case.start, 50
    end = start + torch.tensor([choose.choice([0, 1, 12, 30]) for _ in start])
    query, keys, values = texts(case, side)
    stepped = Slots(
        case.slots.layout,
        tuple(t.clone() for t in case.slots.keys),
        tuple(t.clone() for t in case.slots.values),
        case.slots.position.clone(),
        case.slots.score.clone(),
    )
    outputs, records = [], []
    for slots, many in ((stepped, False), (case.slots, True)):
        output, recorder = torch.zeros_like(query), RetentionRecorder()
        recorder.begin(keys)
        if many:
            decoding.walk_texts(
                "numba",
                slots,
                case.policy,
                (query, keys, values),
                case.scale,
                start=start,
                end=end,
                output=output,
                recorder=recorder,
            )
        else:
            for row in range(len(start)):
                one = slice(row, row + 1)
                walker = Walker(slots.view(one), case.policy.rows(one))
                for at in range(int(start[row]), int(end[row])):
                    walker.begin(torch.tensor([at]))
                    token = (t[one, :, at : at + 1] for t in (query, keys, values))
                    output[one, :, at : at + 1] = walker(0, *token, case.scale)
                    for head in range(keys.shape[1]):
                        here = head_of(slots, 0, row, head).position
                        kept = here[here <= at].long()
                        recorder.table[row, head, at, kept] = True
        outputs.append(output)
        records.append(recorder.table)
    assert torch.equal(*outputs)
    assert torch.equal(*records)
    assert torch.equal(stepped.position, case.slots.position)
    torch.testing.assert_close(stepped.score, case.slots.score, rtol=0, atol=0, equal_nan=True)


def one_head(
    budget: int, dim: int, dtype: torch.dtype, *, alpha: float = 1.0, sinks: int = 0
) -> tuple[Slots, PolicyTensors]:
    rule = EffectivePolicy(
        method="a2sf",
        alpha=((alpha,),),
        budget=budget,
        head_budgets=((budget,),),
        recent=0,
        head_recents=((0,),),
        sinks=sinks,
        prefill_chunk=1,
    )
    slots = Slots.empty(rows=1, slots=((budget,),), head_dim=dim, dtype=dtype, device=CPU)
    return slots, PolicyTensors.stack([rule], [10**6], CPU)


def test_on_a_tie_the_oldest_token_is_evicted_first() -> None:
    slots, policy = one_head(8, 16, torch.float32, sinks=2)
    walker = Walker(slots, policy)
    alike = torch.ones(1, 1, 1, 16)
    for position in range(8):
        walker.begin(torch.tensor([position]))(0, 0.5 * alike, alike, alike, 0.1)
    # From here on all tokens have equal scores and get equal attention.
    for position, evicted in zip(range(8, 12), (2, 3, 4, 5), strict=True):
        slots.score.fill_(0.25)
        walker.begin(torch.tensor([position]))(0, 0.5 * alike, alike, alike, 0.1)
        assert evicted not in slots.position
        assert {0, 1, position} <= set(slots.position.flatten().tolist())


def test_nan_reaches_the_output_of_its_row_only() -> None:
    case = make(3, rows=2, kv_heads=1, slots=(9, 9), methods=("a2sf",), seen=20)
    walker = Walker(case.slots, case.policy)
    query, keys, values = case.tokens()
    keys[0] = torch.nan
    output = walker.begin(case.start)(0, query, keys, values, case.scale)
    assert output[0].isnan().all()
    assert output[1].isfinite().all()


def test_bfloat16_outputs_are_rounded_to_nearest_ties_to_even() -> None:
    slots, policy = one_head(4, 256, torch.bfloat16)
    walker = Walker(slots, policy)
    rng = torch.Generator().manual_seed(2)
    alike = torch.ones(1, 1, 1, 256, dtype=torch.bfloat16)
    values = torch.randn(2, 1, 1, 1, 256, generator=rng).bfloat16()
    # Ties: half a unit in the last place, rounded up or down to the even number.
    values[:, 0, 0, 0, :2] = torch.tensor([[1.0, 1.0078125], [1.0078125, 1.015625]])
    for position in range(2):
        start = torch.tensor([position])
        output = walker.begin(start)(0, alike, alike, values[position], 0.1)
    want = values.float().mean(dim=0)
    assert want[0, 0, 0, :2].tolist() == [1.00390625, 1.01171875]
    assert torch.equal(output, want.bfloat16())


def test_a_row_with_too_few_slots_never_writes_beyond_them() -> None:
    case = make(5, rows=2, kv_heads=2, slots=(40, 40), methods=("a2sf",), seen=38)
    case.policy.budget.fill_(100)
    _, mine = owned(case)
    walker = Walker(case.slots, case.policy)
    for ahead in range(4):
        walker.begin(case.start + ahead)(0, *case.tokens(), case.scale)
    # With one layer, keys have the same layout as scores.
    assert case.slab.keys[0][~mine].isnan().all()
    assert case.slab.score[~mine].isnan().all()


def test_the_exponential_is_accurate_to_float32() -> None:
    x = np.concatenate([np.linspace(-87.0, 0.0, 40001), -np.logspace(-8, 0, 2000)])
    x = x.astype(np.float32)
    found = np.array([walk_programs.exponential(one) for one in x], dtype=np.float64)
    assert abs(found / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    assert walk_programs.exponential(np.float32(0.0)) == 1.0
    assert walk_programs.exponential(np.float32(-200.0)) == 0.0
    assert walk_programs.exponential(np.float32(-np.inf)) == 0.0
    assert math.isnan(walk_programs.exponential(np.float32(np.nan)))


def test_random_scores_equal_the_reference() -> None:
    position = torch.arange(200)
    for seed in (0, 5, 2**31 - 1):
        for layer in (0, 3):
            first = scoring.first_heads(torch.tensor([layer]), 2)
            want = scoring.random_scores(torch.tensor([seed]), first, 3, position[None])
            for head in range(3):
                number = int(first) + head
                found = [walk_programs.random_score(seed, number, at) for at in range(200)]
                assert found == want[0, 0, head].tolist()


def test_engines_in_two_threads_do_not_interfere() -> None:
    ready = threading.Barrier(2)

    def chain(seed: int) -> Slots:
        case = make(seed, rows=2, kv_heads=3, slots=(30, 30), methods=("a2sf",), seen=30)
        walker = Walker(case.slots, case.policy)
        ready.wait()
        for ahead in range(200):
            walker.begin(case.start + ahead)(0, *case.tokens(), case.scale)
        return case.slots

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(chain, (1, 2)))
    ready = threading.Barrier(1)
    for seed, slots in zip((1, 2), together, strict=True):
        alone = chain(seed)
        assert torch.equal(slots.position, alone.position)
        used = alone.position < 2**31 - 1
        assert torch.equal(slots.score[used], alone.score[used])
