"""The fused decode step equals `DecodePass`: outputs, scores, positions, and who is evicted next.

Where there is no CUDA device the programs run in Triton's interpreter, on the processor.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")

import triton.language as tl
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from a2sf.attention import DecodePass
from a2sf.cache import PolicyTensors, Slots
from a2sf.kernels import decode, decode_programs, settling
from a2sf.policy import EffectivePolicy
from a2sf.scoring import EMPTY

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

# Rounding of the output, as a share of the largest value; scores are float32 whatever the model.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@contextmanager
def interpreting(*modules: ModuleType) -> Iterator[None]:
    """Run the modules' programs on the processor, although others imported Triton to compile."""
    if CUDA:
        yield
        return
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


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with interpreting(settling, decode_programs):
        yield


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned() -> Iterator[None]:
    """What `torch.empty` gives is NaN, so that whatever is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
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
) -> Case:
    """Draw rows that have seen fewer tokens than a layer's budget there, as many, or more.

    Layers differ in width. Slots in use hold random tokens in random order, all others NaN.
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
    policy = replace(policy, any_scored=scored)

    widths = policy.budget.amax(dim=1).tolist()
    # A view of a larger slab, as the engine's batches are.
    slab = Slots.empty(
        rows=rows + 1,
        num_kv_heads=kv_heads,
        slots=[w + 3 for w in widths],
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
            want = reference(layer, *(t.double() for t in tokens), case.scale)
            assert output.dtype == dtype
            assert output.shape == want.shape
            torch.testing.assert_close(
                output.double(), want, rtol=0, atol=TOLERANCE[dtype] * float(want.abs().max())
            )
        held = torch.minimum(start + 1, policy.budget)[:, :, None, None]
        used = (torch.arange(slots.score.shape[3], device=DEVICE) < held).expand_as(slots.score)
        assert torch.equal(slots.position, witness.position)
        torch.testing.assert_close(slots.score[used], witness.score[used], rtol=2e-5, atol=1e-7)
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


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that rows of tens of slots take several."""
    monkeypatch.setattr(decode, "TILE_BYTES", 1)
    monkeypatch.setattr(decode, "SETTLE_BLOCK", 32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(40))
def test_a_step_equals_the_reference(seed: int) -> None:
    check(*random_case(seed))


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(40, 240))
def test_any_step_equals_the_reference(seed: int) -> None:
    check(*random_case(seed))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("splits", [1, 3])
def test_a_chain_of_evictions_is_the_references_own(splits: int) -> None:
    case = make(7, rows=2, slots=(9, 20), seen=8)
    slots, policy = case.slots, case.policy
    witness, start = exact(slots), case.start.clone()
    workspace = decode.Workspace.empty(slots, 4, splits)
    plan = decode.plan_slots(slots, policy, start)
    for _ in range(24):
        tokens = case.tokens()
        arguments = {"slots": slots, "layer": 0, "policy": policy, "start": start, "plan": plan}
        output = decode.decode_attention(
            *tokens, scale=case.scale, workspace=workspace, **arguments
        )
        want = DecodePass(witness, policy, start)(0, *(t.double() for t in tokens), case.scale)
        torch.testing.assert_close(output.double(), want, rtol=0, atol=1e-4)
        start += 1
    assert torch.equal(slots.position, witness.position)
    assert (start > policy.budget).all(), "every row has evicted"


def test_among_equal_scores_the_oldest_goes_first() -> None:
    case = make(3, rows=1, kv_heads=1, slots=(20, 20), methods=("a2sf",), seen=20)
    slots, policy = case.slots, case.policy
    policy.alpha.fill_(1.0)
    policy.sinks.fill_(2)
    policy.recent.fill_(10)
    slots.score.fill_(0.25)
    slots.keys[0].fill_(1.0)
    start = case.start
    plan = decode.plan_slots(slots, policy, start)
    workspace = decode.Workspace.empty(slots, 2, 1)
    query, keys, values = case.tokens()
    for evicted in (2, 3, 4, 5):
        assert int(slots.position[0, 0, 0, int(plan)]) == evicted
        # Equal keys are paid alike, in sums that are exact.
        decode.decode_attention(
            torch.full_like(query, 0.5),
            torch.ones_like(keys),
            values,
            slots=slots,
            layer=0,
            policy=policy,
            start=start,
            plan=plan,
            scale=0.1,
            workspace=workspace,
        )
        start += 1
        assert len(set(slots.score[0, 0, 0][slots.position[0, 0, 0] < 20].tolist())) == 1


@pytest.mark.parametrize("splits", [1, 2])
def test_a_row_that_runs_on_beyond_its_slots_keeps_to_them(splits: int, small_tiles: None) -> None:
    case = make(5, rows=2, kv_heads=2, slots=(40, 40), methods=("a2sf",), seen=38)
    case.policy.budget.fill_(100)
    width = case.slots.widths[0]
    start = case.start
    plan = decode.plan_slots(case.slots, case.policy, start)
    workspace = decode.Workspace.empty(case.slots, 4, splits)
    for _ in range(4):
        decode.decode_attention(
            *case.tokens(),
            slots=case.slots,
            layer=0,
            policy=case.policy,
            start=start,
            plan=plan,
            scale=case.scale,
            workspace=workspace,
        )
        start += 1
        assert (plan < width).all()
    assert case.slab.keys[0][:, :, width:].isnan().all()
    assert case.slab.score[..., width:].isnan().all()
    assert (case.slab.position[..., width:] == EMPTY).all()
