"""Test cases and a check for the walk kernel: token by token, head by head.

Runs on a CUDA device, or without one in Triton's interpreter.
"""

import random
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from a2sf.cache import scoring
from a2sf.cache.kernels import triton_walk
from a2sf.cache.kernels.triton_walk import HeadSlots
from a2sf.cache.layout import Layout
from a2sf.cache.passes import DecodePass
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.scoring import EMPTY
from a2sf.cache.slots import Slots
from tests import row_cases
from tests.head_slots import head_of
from tests.interpreting import DEVICE, SCORE_TOLERANCE
from tests.kernel_cases import NEAR_TIE, SERVED
from tests.row_cases import TOLERANCE
from tests.written_out import Head, Stored


@dataclass
class Case:
    """Rows in any state, and their next tokens."""

    slots: HeadSlots
    policy: PolicyTensors
    start: Tensor
    end: Tensor
    query: Tensor
    keys: Tensor
    values: Tensor
    scale: float

    def walk(self, *, recorded: bool) -> tuple[Tensor, Tensor | None]:
        """Run the tokens; return the output and which tokens each query could attend to."""
        output = torch.full_like(self.query, torch.nan)
        rows, kv_heads, side, _ = self.keys.shape
        visible = None
        if recorded:
            # Blocks of a prompt leave records of their padding there.
            visible = torch.ones(rows, kv_heads, side, side, dtype=torch.bool, device=DEVICE)
        triton_walk.walk(
            self.query,
            self.keys,
            self.values,
            slots=self.slots,
            policy=self.policy,
            start=self.start,
            end=self.end,
            scale=self.scale,
            output=output,
            visible=visible,
        )
        return output, visible


def make(seed: int, *, most: int = 12, unequal: bool = False, **kind: object) -> Case:
    """Make random rows as `row_cases.make`, with up to `most` tokens each; rows may have none.

    `unequal` gives every head its own number of slots and window, packed into one slab with gaps
    between the heads. Memory without a token is NaN.
    """
    drawn = row_cases.make(seed, layers=1, **kind)  # type: ignore[arg-type]
    choose = random.Random(seed + 1)
    counts = [choose.choice([0, 1, most // 2, most]) for _ in drawn.start]
    counts[choose.randrange(len(counts))] = most
    end = drawn.start + torch.tensor(counts, device=DEVICE)
    kv_heads, dim = drawn.policy.alpha.shape[2], drawn.slots.keys[0].shape[2]
    side = int(end.max()) + 1
    spoken = torch.arange(side, device=DEVICE)
    spoken = (spoken >= drawn.start[:, None]) & (spoken < end[:, None])

    def vectors(heads: int) -> Tensor:
        # In the layout of a model's projections: heads and width swapped by a view.
        normal = torch.randn(len(counts), side, heads, dim, generator=drawn.rng)
        normal = normal.to(drawn.slots.keys[0].dtype).to(DEVICE)
        return normal.masked_fill(~spoken[..., None, None], torch.nan).transpose(1, 2)

    slots, policy = HeadSlots.of(drawn.slots, 0), drawn.policy
    if unequal:
        slots, policy = _unequal(drawn, choose)
    return Case(
        slots=slots,
        policy=policy,
        start=drawn.start,
        end=end,
        query=vectors(kv_heads * drawn.group),
        keys=vectors(kv_heads),
        values=vectors(kv_heads),
        scale=drawn.scale,
    )


def random_case(seed: int) -> Case:
    """A case of any shape that compiles."""
    choose = random.Random(seed)
    return make(
        seed,
        most=choose.choice([4, 12, 24]),
        unequal=choose.random() < 0.5,
        group=choose.choice([1, 2, 4, 7, 8]),
        dim=choose.choice([32, 32, 64, 80, 96, 128, 256]),
        dtype=choose.choice([torch.float32, torch.float16, torch.bfloat16]),
        rows=choose.randint(1, 3),
        kv_heads=choose.randint(1, 2),
        slots=(1, 6) if choose.random() < 0.3 else (1, 40),
        scored=choose.random() < 0.85,
        same_keys=choose.random() < 0.2,
    )


def served_case(seed: int, most: int = 300) -> Case:
    """A case with served shapes and full tiles; rows of up to `most` slots."""
    choose = random.Random(seed)
    group, kv_heads, dim, dtype = choose.choice(SERVED[:2])
    return make(
        seed,
        most=max(most // 5, 4),
        unequal=choose.random() < 0.5,
        group=group,
        dim=dim,
        dtype=dtype,
        rows=choose.randint(1, 3),
        kv_heads=kv_heads,
        slots=(1, most),
        aligned=True,
    )


def _unequal(drawn: row_cases.Case, choose: random.Random) -> tuple[HeadSlots, PolicyTensors]:
    _, rows, kv_heads = drawn.policy.alpha.shape
    dim = drawn.slots.keys[0].shape[2]
    table: dict[str, list[list[int]]] = {
        name: [[0] * kv_heads for _ in range(rows)]
        for name in ("budget", "recent", "vectors", "marks")
    }
    places = []
    vectors, marks = choose.randint(0, 3), choose.randint(0, 3)
    for row in range(rows):
        for head in range(kv_heads):
            sinks = int(drawn.policy.sinks[row])
            budget = choose.randint(sinks + 1, int(drawn.policy.budget[0, row, head]))
            recent = choose.randint(0, budget - 1 - sinks)
            for name, value in (
                ("budget", budget),
                ("recent", recent),
                ("vectors", vectors),
                ("marks", marks),
            ):
                table[name][row][head] = value
            places.append((row, head, vectors, marks, min(int(drawn.start[row]), budget)))
            vectors += budget + choose.randint(0, 3)
            marks += budget + choose.randint(0, 3)
    tables = {name: torch.tensor(value, device=DEVICE) for name, value in table.items()}
    dtype = drawn.slots.keys[0].dtype
    keys = torch.full((vectors + 1, dim), torch.nan, dtype=dtype, device=DEVICE)
    slots = HeadSlots(
        keys=keys,
        values=keys.clone(),
        position=torch.full((marks + 1,), EMPTY, dtype=torch.int32, device=DEVICE),
        score=torch.full((marks + 1,), torch.nan, device=DEVICE),
        vectors=tables["vectors"],
        marks=tables["marks"],
        width=tables["budget"],
        widest=int(tables["budget"].max()),
    )
    for row, head, at, mark, count in places:
        theirs = head_of(drawn.slots, 0, row, head)
        slots.keys[at : at + count] = theirs.keys[:count]
        slots.values[at : at + count] = theirs.values[:count]
        slots.position[mark : mark + count] = theirs.position[:count]
        slots.score[mark : mark + count] = theirs.score[:count]
    policy = replace(
        drawn.policy,
        budget=tables["budget"][None],
        recent=tables["recent"][None],
    )
    return slots, policy


@dataclass
class Of:
    """One row and KV head of a case, on the processor in float64."""

    keys: Tensor
    values: Tensor
    position: Tensor
    score: Tensor
    budget: int
    recent: int
    sinks: int
    alpha: float
    seed: int
    number: int

    @classmethod
    def case(cls, case: Case, row: int, head: int) -> "Of":
        slots, policy = case.slots, case.policy
        width, dim = int(slots.width[row, head]), case.keys.shape[3]
        vectors, marks = int(slots.vectors[row, head]), int(slots.marks[row, head])

        def mine(tensor: Tensor, first: int, *shape: int) -> Tensor:
            strides = (shape[1], 1) if len(shape) == 2 else (1,)
            found = tensor.as_strided(shape, strides, tensor.storage_offset() + first)
            return found.cpu().clone()

        return cls(
            keys=mine(slots.keys, vectors * dim, width, dim).double(),
            values=mine(slots.values, vectors * dim, width, dim).double(),
            position=mine(slots.position, marks, width),
            score=mine(slots.score, marks, width),
            budget=int(policy.budget[0, row, head]),
            recent=int(policy.recent[0, row, head]),
            sinks=int(policy.sinks[row]),
            alpha=float(policy.alpha[0, row, head]),
            seed=int(policy.random_seed[row]),
            number=int(policy.first_heads[0]) + head,
        )

    def scores(self) -> dict[int, float]:
        """Of the stored tokens, by position."""
        occupied = self.position != EMPTY
        return dict(
            zip(self.position[occupied].tolist(), self.score[occupied].tolist(), strict=True)
        )


class Witness(Protocol):
    """The law for one head."""

    def scores(self) -> dict[int, float]:
        """Of the stored tokens, by position."""
        ...

    def step(self, at: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Process query [group, D], key and value [D]; return the output [group, D]."""
        ...


class WrittenOut:
    """The law as written out in the tests."""

    def __init__(self, head: Of) -> None:
        def hashed(position: int) -> float:
            seed, number = torch.tensor([head.seed]), torch.tensor([head.number])
            return float(scoring.random_scores(seed, number, 1, torch.tensor([[position]])))

        self.head = Head(
            head.alpha,
            head.budget,
            head.recent,
            head.sinks,
            random_score=hashed if head.seed >= 0 else None,
            tokens=[
                Stored(int(p), k.tolist(), v.tolist(), float(s))
                for p, k, v, s in zip(
                    head.position, head.keys, head.values, head.score, strict=True
                )
                if p != EMPTY
            ],
        )

    def scores(self) -> dict[int, float]:
        """As `Witness.scores`."""
        return {token.position: token.score for token in self.head.tokens}

    def step(self, at: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `Witness.step`."""
        (found,) = self.head.block(at, [query.tolist()], [key.tolist()], [value.tolist()], scale)
        return torch.tensor(found, dtype=torch.float64)


class InTorch:
    """The law in torch, which also supports rows without scores."""

    def __init__(self, head: Of, any_scored: bool) -> None:
        def filled(tensor: Tensor) -> Tensor:
            return tensor.nan_to_num(0.0)[None]

        self.slots = Slots(
            Layout.packed(((len(head.keys),),)),
            (filled(head.keys),),
            (filled(head.values),),
            head.position[None],
            filled(head.score),
        )
        self.policy = PolicyTensors(
            first_heads=torch.tensor([head.number]),
            alpha=torch.tensor([[[head.alpha]]], dtype=torch.float64),
            budget=torch.tensor([[[head.budget]]]),
            recent=torch.tensor([[[head.recent]]]),
            sinks=torch.tensor([head.sinks]),
            random_seed=torch.tensor([head.seed]),
            scored=torch.tensor([any_scored]),
            any_random=head.seed >= 0,
            any_scored=any_scored,
        )

    def scores(self) -> dict[int, float]:
        """As `Witness.scores`."""
        position, score = self.slots.position.flatten(), self.slots.score.flatten()
        occupied = position != EMPTY
        return dict(zip(position[occupied].tolist(), score[occupied].tolist(), strict=True))

    def step(self, at: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `Witness.step`."""
        step = DecodePass(self.slots, self.policy, torch.tensor([at]))
        tokens = (query[None, :, None], key[None, None, None], value[None, None, None])
        return step(0, *tokens, scale)[0, :, 0]


def check(case: Case, *, written: bool = False) -> int:
    """Check each query's visible tokens and output, and the final scores, against the law.

    Args:
        case: a case before its walk.
        written: whether to use the written-out law, which is slow; else torch's, which is tested
            against it.

    Returns:
        The number of heads that differ from the law at a near-tie; they are not compared further.
    """
    rows, kv_heads = case.keys.shape[:2]
    group = case.query.shape[1] // kv_heads
    befores = {(r, h): Of.case(case, r, h) for r in range(rows) for h in range(kv_heads)}
    found, visible = case.walk(recorded=True)
    assert visible is not None
    output, table = found.double().cpu(), visible.cpu()
    query, keys, values = (t.double().cpu() for t in (case.query, case.keys, case.values))
    tolerance = TOLERANCE[case.query.dtype]
    parted = 0
    for (row, head), before in befores.items():
        witness: Witness
        written_out = written and case.policy.any_scored
        witness = WrittenOut(before) if written_out else InTorch(before, case.policy.any_scored)
        heads = slice(head * group, (head + 1) * group)
        begin, end = int(case.start[row]), int(case.end[row])
        # Memory without a token does not change.
        assert output[row, heads, :begin].isnan().all()
        assert output[row, heads, end:].isnan().all()
        assert table[row, head, :begin].all()
        assert table[row, head, end:].all()
        for at in range(begin, end):
            scores = witness.scores()
            want = witness.step(
                at, query[row, heads, at], keys[row, head, at], values[row, head, at], case.scale
            )
            theirs = set(witness.scores())
            mine = set(table[row, head, at].nonzero().flatten().tolist())
            if mine != theirs:
                one, other = (scores[p] for p in mine ^ theirs)
                gap = abs(one - other) / max(one, other, 1e-30)
                assert gap <= NEAR_TIE, f"row {row}, head {head}, token {at}: a gap of {gap}"
                parted += 1
                break
            torch.testing.assert_close(
                output[row, heads, at], want, rtol=0, atol=tolerance * float(want.abs().max())
            )
        else:
            after = Of.case(case, row, head)
            mine_now, theirs_now = after.scores(), witness.scores()
            assert mine_now.keys() == theirs_now.keys()
            for position, score in theirs_now.items():
                score_now = mine_now[position]
                assert abs(score_now - score) <= 5 * SCORE_TOLERANCE * score + 1e-6, (
                    position,
                    score,
                )
            stored = {int(p): k for p, k in zip(after.position, after.keys, strict=True)}
            for at in stored.keys() & set(range(begin, end)):
                assert torch.equal(stored[at], keys[row, head, at])
    return parted
