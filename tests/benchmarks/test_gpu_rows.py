"""Rows filled as if they had read a prompt: the law accepts them, and their bytes are counted."""

from collections.abc import Iterator

import pytest
import torch

from a2sf.cache.slots import SLOT_OVERHEAD_BYTES
from a2sf.policy import EffectivePolicy
from benchmarks.gpu.filling import SINKS, Rows, kv_step_bytes, policies, source_row
from benchmarks.gpu.models import DRY_SHAPES, SHAPES, build, plain, token_bytes, weight_bytes
from tests.head_slots import head_of

CPU = torch.device("cpu")
BUDGET = 16
MODEL = build(DRY_SHAPES["8b"], CPU, torch.float32)
POLICIES = policies(MODEL, BUDGET, 500)


def held(rows: Rows, layer: int, row: int, head: int) -> list[int]:
    return sorted(head_of(rows.slab, layer, row, head).stored())


@pytest.mark.parametrize("name", ["a2sf", "table", "window"])
@pytest.mark.parametrize("seen", [5, BUDGET, 90])
def test_filled_rows_decode_on_under_the_law(name: str, seen: int) -> None:
    policy = POLICIES[name]
    rows = Rows(MODEL, 3, BUDGET, graphs=True)
    rows.fill(policy, seen)
    protected = {*range(min(SINKS, seen)), *range(max(seen - policy.recent, 0), seen)}
    for steps in range(4):
        now = seen + steps
        assert rows.positions == [now] * 3
        for layer in range(2):
            for head in range(2):
                kept = held(rows, layer, 1, head)
                assert len(kept) == len(set(kept)) == min(now, BUDGET)
                assert kept[-1] == now - 1
                assert set(range(min(SINKS, now))) <= set(kept)
                assert steps or protected <= set(kept)
        rows.step()
    assert all(0 <= token < MODEL.shape.vocab_size for token in rows.tokens)


def test_heads_keep_different_tokens_and_rows_share_no_memory() -> None:
    rows = Rows(MODEL, 2, BUDGET, graphs=True)
    rows.fill(POLICIES["a2sf"], 90)
    assert held(rows, 0, 0, 0) != held(rows, 0, 0, 1)
    assert held(rows, 0, 0, 0) == held(rows, 0, 1, 0)
    rows.slab.keys[0][0].zero_()
    assert rows.slab.keys[0][1].any()


def test_heads_of_other_budgets_hold_as_many_as_theirs() -> None:
    policy = POLICIES["a2sf"].model_copy(
        update={"head_budgets": ((10, 15), (22, 8)), "head_recents": ((2, 4), (3, 1))}
    )
    slots = source_row(MODEL, policy, 90)
    for layer, counts in enumerate(policy.head_budgets):
        for head, count in enumerate(counts):
            assert len(head_of(slots, layer, 0, head).stored()) == count
    assert torch.isfinite(slots.score).all()


@pytest.fixture
def interpreted() -> Iterator[None]:
    pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")
    from a2sf.cache.kernels import decode_programs, score_update
    from tests.interpreting import interpreting

    with interpreting(score_update, decode_programs):
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["a2sf", "window"])
def test_filled_rows_decode_equally_by_kernels_and_by_torch(name: str) -> None:
    both = [Rows(MODEL, 2, BUDGET, graphs=True, kernels=kernels) for kernels in ("auto", "torch")]
    assert [rows.kernels for rows in both] == ["triton", "torch"]
    for rows in both:
        rows.fill(POLICIES[name], 60)
        for _ in range(3):
            rows.step()
    fused, reference = both
    assert fused.tokens == reference.tokens
    for row in range(2):
        for layer in range(2):
            assert held(fused, layer, row, 0) == held(reference, layer, row, 0)
    torch.testing.assert_close(fused.slab.score, reference.slab.score, rtol=1e-4, atol=1e-6)


def test_kv_bytes_touched_are_those_of_the_slabs_own_tensors() -> None:
    policy = POLICIES["a2sf"]
    rows = Rows(MODEL, 3, BUDGET, graphs=True)
    slab = rows.slab
    # Keys, values and positions are read; scores are read and written.
    touched = slab.nbytes + slab.score.nbytes
    assert kv_step_bytes(MODEL, policy, [90] * 3) == touched
    assert kv_step_bytes(MODEL, POLICIES["window"], [90] * 3) == slab.nbytes
    # A row that has seen 7 tokens holds them and the new one.
    assert kv_step_bytes(MODEL, policy, [7]) == touched // 3 * 8 // BUDGET
    assert rows.kv_bytes == slab.nbytes
    per_slot = slab.nbytes // (3 * BUDGET)
    heads = MODEL.shape.num_layers * MODEL.shape.num_kv_heads
    assert token_bytes(MODEL) == per_slot - heads * SLOT_OVERHEAD_BYTES


def test_weights_read_are_all_but_the_rows_of_an_untied_embedding() -> None:
    every = sum(p.nbytes for p in MODEL.module.parameters())
    embedding = MODEL.module.get_input_embeddings().weight
    assert weight_bytes(MODEL) == every - embedding.nbytes
    tied = build(DRY_SHAPES["1b"], CPU, torch.float32)
    assert weight_bytes(tied) == sum(p.nbytes for p in tied.module.parameters())


@pytest.mark.parametrize(("name", "least", "most"), [("8b", 7.9e9, 8.1e9), ("1b", 1.2e9, 1.3e9)])
def test_the_large_models_have_as_many_weights_as_their_names(
    name: str, least: float, most: float
) -> None:
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        module = LlamaForCausalLM(SHAPES[name].config())
    assert least < sum(p.numel() for p in module.parameters()) < most


def test_both_engines_run_the_same_weights_in_one_memory() -> None:
    module = plain(MODEL)
    assert module.config._attn_implementation == "sdpa"
    assert MODEL.module.config._attn_implementation == "a2sf"
    for mine, theirs in zip(MODEL.module.parameters(), module.parameters(), strict=True):
        assert mine is theirs
    ids = torch.arange(9)[None]

    def attend(
        layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )

    hidden = MODEL.hidden_states(ids, ids, attend)
    with torch.inference_mode():
        torch.testing.assert_close(module(ids).logits, MODEL.logits(hidden))


def test_a_policy_of_each_kind_is_compared_at_one_budget() -> None:
    def kinds(policy: EffectivePolicy) -> tuple[str, bool, int]:
        return policy.method, policy.scored, policy.budget

    assert {name: kinds(policy) for name, policy in POLICIES.items()} == {
        "a2sf": ("a2sf", True, BUDGET),
        "table": ("table", True, BUDGET),
        "window": ("window", False, BUDGET),
        "full": ("full", False, 500),
    }
    assert len({alpha for row in POLICIES["table"].alpha for alpha in row}) > 1
