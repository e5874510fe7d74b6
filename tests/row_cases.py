"""Random rows in any state, for tests of decode steps.

Owns their generation. Unused slots hold NaN, to detect reads of them.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots
from a2sf.policy import EffectivePolicy
from tests.head_slots import HeadSlots, head_of
from tests.interpreting import ALIGNMENT, DEVICE

# Rounding of the output relative to the largest value; scores are float32 for every dtype.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class Case:
    """Rows that decode together, in any state."""

    slab: Slots
    slots: Slots
    """A view of the slab's first rows, and of the first slots of each head."""
    policy: PolicyTensors
    start: torch.Tensor
    group: int
    rng: torch.Generator
    scale: float

    def normal(self, heads: int) -> torch.Tensor:
        """Vectors in the layout of a model's projections: heads and width swapped by a view."""
        rows, dim = len(self.start), self.slots.keys[0].shape[2]
        drawn = torch.randn(rows, 1, heads, dim, generator=self.rng)
        return drawn.to(self.slots.keys[0].dtype).to(DEVICE).transpose(1, 2)

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = self.policy.alpha.shape[2]
        return self.normal(heads * self.group), self.normal(heads), self.normal(heads)


def make(
    seed: int,
    *,
    group: int = 2,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    rows: int = 3,
    kv_heads: int = 2,
    layers: int = 1,
    slots: tuple[int, int] = (1, 60),
    methods: tuple[str, ...] = ("a2sf", "a2sf", "table", "window", "random"),
    scored: bool = True,
    same_keys: bool = False,
    seen: int | None = None,
    aligned: bool = False,
) -> Case:
    """Make random rows with fewer tokens than a head's budget, as many, or more.

    Heads have different budgets. Slots in use hold random tokens in random order, all others NaN.
    `aligned` rounds widths up to multiples of `ALIGNMENT`.
    """
    choose = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    policies, lengths = [], []
    for _ in range(rows):
        method = choose.choice(methods)
        sinks = choose.choice([0, 0, 1, 4])
        budgets = tuple(
            tuple(choose.randint(*slots) for _ in range(kv_heads)) for _ in range(layers)
        )
        least, most = min(map(min, budgets)), max(map(max, budgets))
        sinks = min(sinks, least - 1)
        share = 1.0 if method == "window" else None

        def recent(room: int, share: float | None = share) -> int:
            return int(room * (choose.choice([0.0, 1.0, 0.33]) if share is None else share))

        factors = [0.0, 0.5, 0.99, 1.0] if method in ("a2sf", "table") else [1.0]
        policies.append(
            EffectivePolicy(
                method=method,
                alpha=tuple(
                    tuple(choose.choice(factors) for _ in range(kv_heads)) for _ in range(layers)
                ),
                budget=most,
                head_budgets=budgets,
                recent=0,
                head_recents=tuple(tuple(recent(b - sinks - 1) for b in row) for row in budgets),
                sinks=sinks,
                prefill_chunk=0,
                random_seed=choose.randrange(2**31) if method == "random" else None,
            )
        )
        some = choose.choice([0, 1, least - 1, least, most, 500])
        lengths.append(some if seen is None else seen)
    policy = PolicyTensors.stack(policies, [10**6] * rows, DEVICE)
    # Head numbers as on a rank that is not the first.
    policy = replace(
        policy,
        scored=policy.scored & scored,
        any_scored=scored,
        first_heads=policy.first_heads + 5,
    )

    widths = tuple(map(tuple, policy.budget.amax(dim=1).tolist()))
    beside = ALIGNMENT if aligned else 3
    if aligned:
        widths = tuple(tuple(-(-w // ALIGNMENT) * ALIGNMENT for w in row) for row in widths)
    # A view of a larger slab, as in the engine.
    slab = Slots.empty(
        rows=rows + 1,
        slots=tuple(tuple(w + beside for w in row) for row in widths),
        head_dim=dim,
        dtype=dtype,
        device=DEVICE,
    )
    for tensor in (*slab.keys, *slab.values, slab.score):
        tensor.fill_(torch.nan)
    for layer in range(layers):
        for row, length in enumerate(lengths):
            for head, budget in enumerate(policies[row].head_budgets[layer]):
                count = min(length, budget)
                mine = head_of(slab, layer, row, head)
                kept = torch.randperm(max(length, 1), generator=rng)[:count]
                mine.position[:count] = kept.int()
                # Few distinct scores, so that there are many ties.
                mine.score[:count] = torch.randint(0, 4, (count,), generator=rng) / 4
                vectors = torch.randn(2, count, dim, generator=rng)
                if same_keys:
                    vectors[0] = 1.0
                mine.keys[:count] = vectors[0].to(dtype)
                mine.values[:count] = vectors[1].to(dtype)
    return Case(
        slab=slab,
        slots=slab.view(slice(0, rows), widths),
        policy=policy,
        start=torch.tensor(lengths, device=DEVICE),
        group=group,
        rng=rng,
        scale=choose.choice([dim**-0.5, 0.5]),
    )


def exact(slots: Slots) -> Slots:
    """The same tokens in float64. Empty slots are zero, because the reference multiplies them."""

    def wide(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(t.nan_to_num(0.0).double() for t in tensors)

    return Slots(
        slots.layout,
        wide(slots.keys),
        wide(slots.values),
        slots.position.clone(),
        slots.score.nan_to_num(0.0),
    )


def heads_of(slots: Slots) -> Iterator[tuple[tuple[int, int, int], HeadSlots]]:
    """All heads of all rows: layer, row, head number, and slots."""
    for layer, row in itertools.product(range(len(slots.keys)), range(len(slots.position))):
        for head in range(len(slots.layout.slots[layer])):
            yield (layer, row, head), head_of(slots, layer, row, head)


def owned(case: Case) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Masks of the slab's slots that belong to a head of a row of the case.

    For each layer [rows, slots] bool, for keys and values; and [rows, slots of all layers] bool.
    """
    slab = case.slab
    vectors = [torch.zeros(keys.shape[:2], dtype=torch.bool, device=DEVICE) for keys in slab.keys]
    marks = torch.zeros_like(slab.position, dtype=torch.bool)
    layout = case.slots.layout
    for layer, widths in enumerate(layout.slots):
        for head, width in enumerate(widths):
            first = sum(layout.pitches[layer][:head])
            mark = sum(map(sum, layout.pitches[:layer])) + first
            vectors[layer][: len(case.start), first : first + width] = True
            marks[: len(case.start), mark : mark + width] = True
    return vectors, marks


def check_state(
    case: Case, witness: Slots, seen: torch.Tensor, judged: torch.Tensor, tolerance: float
) -> None:
    """Check that slots equal the witness after `seen` [rows] tokens, and no other memory changed.

    Scores of the rows `judged` [rows] bool must be equal within a relative tolerance.
    """
    slots, budget = case.slots, case.policy.budget
    for (layer, row, head), theirs in heads_of(witness):
        mine = head_of(slots, layer, row, head)
        count = min(int(seen[row]), int(budget[layer, row, head]))
        assert torch.equal(mine.position, theirs.position)
        if judged[row]:
            torch.testing.assert_close(
                mine.score[:count], theirs.score[:count], rtol=tolerance, atol=1e-7
            )
        # Unused slots, other rows and memory outside the view must not change.
        assert mine.score[count:].isnan().all()
        assert torch.equal(mine.keys.nan_to_num(0.0).double(), theirs.keys)
        assert torch.equal(mine.values.nan_to_num(0.0).double(), theirs.values)
    vectors, marks = owned(case)
    slab = case.slab
    assert slab.score[~marks].isnan().all()
    for layer, mine_here in enumerate(vectors):
        assert slab.keys[layer][~mine_here].isnan().all()
        assert slab.values[layer][~mine_here].isnan().all()
