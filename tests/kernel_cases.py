"""Cases that the kernel of a decode step is held to, and the judges: one step, and a chain.

Runs where there is a CUDA device and, in Triton's interpreter, where there is none.
"""

import random
from dataclasses import dataclass, replace

import torch

from a2sf.attention import DecodePass
from a2sf.cache import PolicyTensors, Slots
from a2sf.kernels import decode
from a2sf.policy import EffectivePolicy
from tests.interpreting import ALIGNMENT, DEVICE, SCORE_TOLERANCE

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
    """Draw rows that have seen fewer tokens than a layer's budget there, as many, or more.

    Layers differ in width. Slots in use hold random tokens in random order, all others NaN.
    `aligned` makes widths multiples of `ALIGNMENT`, beyond what the rows' budgets need.
    """
    choose = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    policies, lengths = [], []
    for _ in range(rows):
        method = choose.choice(methods)
        sinks = choose.choice([0, 0, 1, 4])
        budgets = [choose.randint(*slots) for _ in range(layers)]
        sinks = min(sinks, min(budgets) - 1)
        recents = [choose.choice([0, b - sinks - 1, (b - sinks) // 3]) for b in budgets]
        if method == "window":
            recents = [b - sinks - 1 for b in budgets]
        factors = [0.0, 0.5, 0.99, 1.0] if method in ("a2sf", "table") else [1.0]
        policies.append(
            EffectivePolicy(
                method=method,
                alpha=tuple(
                    tuple(choose.choice(factors) for _ in range(kv_heads)) for _ in range(layers)
                ),
                budget=max(budgets),
                layer_budgets=tuple(budgets),
                recent=0,
                layer_recents=tuple(
                    min(r, b - sinks - 1) for r, b in zip(recents, budgets, strict=True)
                ),
                sinks=sinks,
                prefill_chunk=0,
                random_seed=choose.randrange(2**31) if method == "random" else None,
            )
        )
        some = choose.choice([0, 1, min(budgets) - 1, min(budgets), max(budgets), 500])
        lengths.append(some if seen is None else seen)
    policy = PolicyTensors.stack(policies, [10**6] * rows, DEVICE)
    # As a rank numbers heads that is not the first.
    policy = replace(
        policy,
        scored=policy.scored & scored,
        any_scored=scored,
        first_heads=policy.first_heads + 5,
    )

    widths = policy.budget.amax(dim=1).tolist()
    beside = ALIGNMENT if aligned else 3
    if aligned:
        widths = [-(-width // ALIGNMENT) * ALIGNMENT for width in widths]
    # A view of a larger slab, as the engine's batches are.
    slab = Slots.empty(
        rows=rows + 1,
        num_kv_heads=kv_heads,
        slots=[w + beside for w in widths],
        head_dim=dim,
        dtype=dtype,
        device=DEVICE,
    )
    for tensor in (*slab.keys, *slab.values, slab.score):
        tensor.fill_(torch.nan)
    for layer in range(layers):
        for row, length in enumerate(lengths):
            held = min(length, policies[row].layer_budgets[layer])
            for head in range(kv_heads):
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


def check(case: Case, steps: int, splits: int) -> None:
    """Decode some steps; after each, everything equals the reference's step from the same state."""
    slots, policy, start = case.slots, case.policy, case.start.clone()
    rows, kv_heads = slots.score.shape[1:3]
    workspace = decode.Workspace.empty(slots, kv_heads * case.group, splits)
    plan = decode.plan_slots(slots, policy, start)
    dtype = slots.keys[0].dtype
    for _ in range(steps):
        witness = exact(slots)
        reference = DecodePass(witness, policy, start)
        for layer in range(len(slots.keys)):
            tokens = case.tokens()
            output = decode.decode_attention(
                *tokens,
                slots=slots,
                layer=layer,
                policy=policy,
                start=start,
                plan=plan,
                scale=case.scale,
                workspace=workspace,
            )
            query, keys, values = (t.double() for t in tokens)
            want = reference(layer, query, keys, values, case.scale)
            assert output.dtype == dtype
            assert output.shape == want.shape
            torch.testing.assert_close(
                output.double(), want, rtol=0, atol=TOLERANCE[dtype] * float(want.abs().max())
            )
        held = torch.minimum(start + 1, policy.budget)[:, :, None, None]
        used = (torch.arange(slots.score.shape[3], device=DEVICE) < held).expand_as(slots.score)
        assert torch.equal(slots.position, witness.position)
        torch.testing.assert_close(
            slots.score[used], witness.score[used], rtol=SCORE_TOLERANCE, atol=1e-7
        )
        # Unused slots are nobody's, and no more are those of other rows.
        assert slots.score[~used].isnan().all()
        assert case.slab.score[:, rows:].isnan().all()
        assert case.slab.score[..., slots.score.shape[3] :].isnan().all()
        for tensor, width in zip(case.slab.keys + case.slab.values, slots.widths * 2, strict=True):
            assert tensor[rows:].isnan().all()
            assert tensor[:, :, width:].isnan().all()
        for mine, theirs in zip(
            (*slots.keys, *slots.values), (*witness.keys, *witness.values), strict=True
        ):
            assert torch.equal(mine.nan_to_num(0.0).double(), theirs)
        start += 1
        # From scores equal to the last bit the same slots must follow.
        following = decode.plan_slots(slots, policy, start)
        evicting = (start >= policy.budget)[..., None].expand_as(plan)
        room = torch.tensor([k.shape[2] for k in slots.keys], device=DEVICE)[:, None, None]
        relevant = evicting | (following < room)
        assert torch.equal(plan[relevant], following[relevant])
        assert (plan < room).all()


def random_case(seed: int) -> tuple[Case, int, int]:
    choose = random.Random(seed)
    small = choose.random() < 0.3
    case = make(
        seed,
        group=choose.choice([1, 2, 4, 7, 8]),
        dim=choose.choice([32, 32, 64, 80, 96, 128, 256]),
        dtype=choose.choice([torch.float32, torch.float16, torch.bfloat16]),
        rows=choose.randint(1, 3),
        kv_heads=choose.randint(1, 2),
        layers=choose.choice([1, 1, 2]),
        slots=(1, 6) if small else (1, 80),
        scored=choose.random() < 0.85,
        same_keys=choose.random() < 0.2,
    )
    return case, choose.choice([1, 2, 4]), choose.choice([1, 1, 2, 3, 5])


SERVED = (
    # As in models of 8 and of 1 billion weights, and one that fills no tile.
    (4, 8, 128, torch.bfloat16),
    (4, 8, 64, torch.bfloat16),
    (7, 2, 80, torch.float16),
)
"""Query heads a KV head, KV heads, head size, dtype: few, for each is compiled on its own."""


def served_case(seed: int, most: int = 300) -> tuple[Case, int, int]:
    """As `random_case`, of the kinds that are served and in full tiles; rows of up to `most`."""
    choose = random.Random(seed)
    group, kv_heads, dim, dtype = choose.choice(SERVED)
    case = make(
        seed,
        group=group,
        dim=dim,
        dtype=dtype,
        rows=choose.randint(1, 3),
        kv_heads=kv_heads,
        layers=choose.choice([1, 1, 2]),
        slots=(1, 6) if choose.random() < 0.3 else (1, most),
        scored=choose.random() < 0.85,
        same_keys=choose.random() < 0.2,
        aligned=True,
    )
    return case, choose.choice([1, 2, 4]), choose.choice([1, 3])


NEAR_TIE = 1e-4
"""The widest relative gap of two scores that rounding may swap, after hundreds of steps."""


def check_chain(case: Case, steps: int, splits: int) -> int | None:
    """Decode on and on beside a reference that is never corrected.

    Returns the step in which two scores within rounding of each other were taken in another order,
    after which the two have different tokens for good reason; None where that never was.
    """
    slots, policy = case.slots, case.policy
    witness, start = exact(slots), case.start.clone()
    workspace = decode.Workspace.empty(slots, slots.score.shape[2] * case.group, splits)
    plan = decode.plan_slots(slots, policy, start)
    dtype = slots.keys[0].dtype
    for step in range(steps):
        tokens = case.tokens()
        wanted = decode.plan_slots(witness, policy, start)
        if not torch.equal(plan, wanted):
            mine, theirs = (witness.score.gather(-1, p[..., None]) for p in (plan, wanted))
            gap = float(((mine - theirs).abs() / torch.maximum(mine, theirs).clamp(1e-30)).max())
            assert gap <= NEAR_TIE, f"step {step}: the slots parted by a gap of {gap}"
            return step
        reference = DecodePass(witness, policy, start)
        query, keys, values = (t.double() for t in tokens)
        want = reference(0, query, keys, values, case.scale)
        output = decode.decode_attention(
            *tokens,
            slots=slots,
            layer=0,
            policy=policy,
            start=start,
            plan=plan,
            scale=case.scale,
            workspace=workspace,
        )
        torch.testing.assert_close(
            output.double(), want, rtol=0, atol=5 * TOLERANCE[dtype] * float(want.abs().max())
        )
        start += 1
    assert torch.equal(slots.position, witness.position)
    return None
