"""Cases that the kernels are held to, and the judges: one decode step, a prompt's block, a chain.

Runs where there is a CUDA device and, in Triton's interpreter, where there is none. Needs Triton;
pytest only for interpreting.
"""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from a2sf import attention, scoring
from a2sf.attention import DecodePass
from a2sf.cache import PolicyTensors, Slots
from a2sf.kernels import decode, prefill
from a2sf.policy import EffectivePolicy
from a2sf.scoring import EMPTY

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

# Rounding of the output, as a share of the largest value; scores are float32 whatever the model.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

SCORE_TOLERANCE = 2e-4 if CUDA else 2e-5
"""Relative, of scores: tensor cores cut off what they add up, and a logit of 30 feels it."""

ALIGNMENT = 16
"""What sizes must be multiples of for Triton to compile one program for all of them."""


@contextmanager
def interpreting(*modules: ModuleType) -> Iterator[None]:
    """Run the modules' programs on the processor, although others imported Triton to compile."""
    if CUDA:
        yield
        return
    import pytest
    import triton.language as tl
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    # The interpreter holds bfloat16 as bits, and would multiply them as integers.
    def widened(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object
    ) -> object:
        a, b = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(InterpreterBuilder, "create_dot", widened)
        for module in (tl, tl.standard, *modules):
            for name, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    patch.setattr(module, name, InterpretedFunction(function.fn))
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Let what `torch.empty` gives be NaN, so that whatever is not written shows."""
    with warnings.catch_warnings():
        # The reference's products on a device go through cuBLAS, which only warns.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


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
    policy = replace(policy, any_scored=scored, first_heads=policy.first_heads + 5)

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


def check_mass(
    seed: int, kind: tuple[int, int, int, torch.dtype] | None = None, *, known: bool = False
) -> None:
    """A block of several rows, ragged, over slots that hold older tokens, the block, or nothing.

    `kind` as in `SERVED`, or one that the seed decides; `known` hands in the normalisers.
    """
    choose = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    rows, kv_heads = choose.randint(1, 2), choose.randint(1, 2)
    group, dim = choose.choice([1, 2, 4, 7]), choose.choice([16, 32, 32])
    width = choose.choice([1, 15, 16, 40, 70])
    slots = width + choose.choice([0, 3, 30])
    dtype = choose.choice([torch.float32, torch.float16, torch.bfloat16])
    beside = 2
    if kind is not None:
        group, kv_heads, dim, dtype = kind
        width *= 4
        slots = -(-(4 * slots) // ALIGNMENT) * ALIGNMENT
        beside = ALIGNMENT
    lengths = torch.tensor([choose.randint(1, width) for _ in range(rows)])
    older = choose.randint(0, slots - width)
    start = torch.tensor([older + choose.choice([0, 100]) for _ in range(rows)])

    position = torch.full((rows, kv_heads, slots + beside), EMPTY, dtype=torch.int32)
    for row in range(rows):
        for head in range(kv_heads):
            old = torch.randperm(int(start[row]), generator=rng)[:older]
            new = int(start[row]) + torch.arange(int(lengths[row]))
            tokens = torch.cat([old, new]).int()
            # In order, as in an exact prompt, or in none, as after evictions.
            where = torch.arange(slots) if seed % 2 else torch.randperm(slots, generator=rng)
            position[row, head, where[: len(tokens)]] = tokens
    position = position[:, :, :slots].to(DEVICE)
    factors = torch.tensor([0.0, 0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
    alpha = factors[torch.randint(0, 5, (1, rows, kv_heads), generator=rng)]
    weights = scoring.query_weights(alpha, lengths, 0, width)[0].to(DEVICE)

    # As a model hands them in: heads and width swapped by a view.
    query = torch.randn(rows, width, kv_heads * group, dim, generator=rng)
    query = query.to(dtype).to(DEVICE).transpose(1, 2)
    keys = torch.randn(rows, kv_heads, slots, dim, generator=rng).to(dtype).to(DEVICE)
    at = (start[:, None] + torch.arange(width)).to(DEVICE)
    lse = None
    if known:
        expanded = keys.double().repeat_interleave(group, dim=1).transpose(2, 3)
        logits = query.double() @ expanded * 0.4
        unseen = position.repeat_interleave(group, dim=1)[:, :, None] > at[:, None, :, None]
        lse = logits.masked_fill(unseen, -torch.inf).logsumexp(dim=-1).float()
    want = attention.mass(query.double().contiguous(), at, keys.double(), position, weights, 0.4)
    # What is beyond a row's length or in an empty slot is nobody's.
    query[(weights == 0).all(dim=1)[:, None].expand(-1, kv_heads * group, -1)] = torch.nan
    keys[position == EMPTY] = torch.nan
    got = prefill.mass(query, at, keys, position, weights, 0.4, lse)
    torch.testing.assert_close(got, want, rtol=SCORE_TOLERANCE, atol=1e-6)
