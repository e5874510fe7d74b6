"""Rows at any point of their lives, that what carries out a decode step is held to.

Owns the drawing of them. Slots that nobody uses hold NaN, so that whoever reads one is found out.
"""

import random
from dataclasses import dataclass, replace

import torch

from a2sf.cache import PolicyTensors, Slots
from a2sf.policy import EffectivePolicy
from tests.interpreting import ALIGNMENT, DEVICE

# Rounding of the output, as a share of the largest value; scores are float32 whatever the model.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class Case:
    """Rows that decode side by side, at any point of their lives."""

    slab: Slots
    slots: Slots
    """A view of the slab's first rows and slots."""
    policy: PolicyTensors
    start: torch.Tensor
    group: int
    rng: torch.Generator
    scale: float

    def normal(self, heads: int) -> torch.Tensor:
        """Vectors as a model hands them in: heads and width swapped by a view."""
        rows, dim = len(self.start), self.slots.keys[0].shape[3]
        drawn = torch.randn(rows, 1, heads, dim, generator=self.rng)
        return drawn.to(self.slots.keys[0].dtype).to(DEVICE).transpose(1, 2)

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = self.slots.score.shape[2]
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
    """Draw rows that have seen fewer tokens than a head's budget, as many, or more.

    Heads differ in their budgets. Slots in use hold random tokens in random order, all others NaN.
    `aligned` makes widths multiples of `ALIGNMENT`, beyond what the rows' budgets need.
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
    # As a rank numbers heads that is not the first.
    policy = replace(
        policy,
        scored=policy.scored & scored,
        any_scored=scored,
        first_heads=policy.first_heads + 5,
    )

    widths = policy.budget.amax(dim=(1, 2)).tolist()
    beside = ALIGNMENT if aligned else 3
    if aligned:
        widths = [-(-width // ALIGNMENT) * ALIGNMENT for width in widths]
    # A view of a larger slab, as the engine's batches are.
    slab = Slots.empty(
        rows=rows + 1,
        slots=tuple((w + beside,) * kv_heads for w in widths),
        head_dim=dim,
        dtype=dtype,
        device=DEVICE,
    )
    for tensor in (*slab.keys, *slab.values, slab.score):
        tensor.fill_(torch.nan)
    for layer in range(layers):
        for row, length in enumerate(lengths):
            for head, budget in enumerate(policies[row].head_budgets[layer]):
                held = min(length, budget)
                kept = torch.randperm(max(length, 1), generator=rng)[:held]
                slab.position[layer, row, head, :held] = kept.int()
                # Few distinct scores, so that many tie.
                drawn = torch.randint(0, 4, (held,), generator=rng) / 4
                slab.score[layer, row, head, :held] = drawn
                vectors = torch.randn(2, held, dim, generator=rng)
                if same_keys:
                    vectors[0] = 1.0
                slab.keys[layer][row, head, :held] = vectors[0].to(dtype)
                slab.values[layer][row, head, :held] = vectors[1].to(dtype)
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
    """The same tokens in float64; empty slots hold zeros, for the reference multiplies by them."""

    def wide(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(t.nan_to_num(0.0).double() for t in tensors)

    return Slots(
        wide(slots.keys), wide(slots.values), slots.position.clone(), slots.score.nan_to_num(0.0)
    )
