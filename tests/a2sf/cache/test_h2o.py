"""The preset h2o equals a separate H2O implementation with masks over all positions."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2sf.cache.budgets import resolve
from a2sf.cache.passes import BlockPass, DecodePass, end_prompt
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots
from a2sf.policy import CachePolicy


def heavy_hitters(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, prompt: int, budget: int, sinks: int
) -> tuple[np.ndarray, list[set[int]]]:
    """H2O for one KV head: q [group, N, D], k and v [N, D] -> outputs [group, N, D], kept sets.

    The score is the summed attention; half of the slots besides the sinks hold the most recent
    tokens. The prompt is one block and is trimmed at its end; then each token evicts one.
    """
    group, length, dim = q.shape
    recent = (budget - sinks) // 2
    total = np.zeros(length)
    alive = np.zeros(length, dtype=bool)
    outputs = np.zeros_like(q)
    kept: list[set[int]] = []

    def shrink(now: int, size: int) -> None:
        protected = np.arange(length) < sinks
        protected |= np.arange(length) >= now - recent
        while alive.sum() > size:
            open_to = np.flatnonzero(alive & ~protected)
            alive[open_to[np.argmin(total[open_to])]] = False

    for now in range(length):
        if now >= prompt:
            shrink(now, budget - 1)
        alive[now] = True
        for member in range(group):
            seen = np.flatnonzero(alive[: now + 1])
            logits = k[seen] @ q[member, now] / np.sqrt(dim)
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            outputs[member, now] = weights @ v[seen]
            total[seen] += weights
        if now == prompt - 1:
            shrink(prompt, budget)
        kept.append(set(np.flatnonzero(alive).tolist()))
    return outputs, kept


@given(
    seed=st.integers(0, 10_000),
    group=st.sampled_from([1, 2, 4]),
    prompt=st.integers(1, 24),
    steps=st.integers(1, 20),
    sinks=st.integers(0, 5),
    room=st.integers(1, 30),
)
def test_the_preset_is_h2o(
    seed: int, group: int, prompt: int, steps: int, sinks: int, room: int
) -> None:
    rng = np.random.default_rng(seed)
    length, dim, kv_heads = prompt + steps, 4, 2
    budget = sinks + 1 + room
    q = 2 * rng.normal(size=(kv_heads * group, length, dim))
    k, v = rng.normal(size=(2, kv_heads, length, dim))
    policy = resolve(
        CachePolicy(preset="h2o", budget=budget, sinks=sinks),
        table=None,
        server=CachePolicy(),
        length=length,
        slots=budget,
        num_layers=1,
        num_kv_heads=kv_heads,
    )
    rows = PolicyTensors.stack([policy], [length], torch.device("cpu"))

    def empty(count: int) -> Slots:
        return Slots.empty(
            rows=1,
            slots=((count,) * kv_heads,),
            head_dim=dim,
            dtype=torch.float64,
            device=torch.device("cpu"),
        )

    tq, tk, tv = (torch.from_numpy(x)[None] for x in (q, k, v))
    scale = dim**-0.5
    zero, n = torch.tensor([0]), torch.tensor([prompt])
    staging, slots = empty(prompt), empty(budget)
    block = BlockPass(
        staging, rows, start=zero, lengths=n, used=torch.zeros_like(rows.budget), width=prompt
    )
    outputs = [block(0, *(x[:, :, :prompt] for x in (tq, tk, tv)), scale)]
    used = end_prompt(staging, block.used_after, n, rows)
    slots.copy_row(0, staging, 0, used[:, 0].tolist())
    stored = [slots.whole.position[0].clone()]
    for now in range(prompt, length):
        one = (x[:, :, now : now + 1] for x in (tq, tk, tv))
        outputs.append(DecodePass(slots, rows, torch.tensor([now]))(0, *one, scale))
        stored.append(slots.whole.position[0].clone())
    mine = torch.cat(outputs, dim=2)[0].numpy()
    for head in range(kv_heads):
        members = slice(head * group, (head + 1) * group)
        want, kept = heavy_hitters(
            q[members], k[head], v[head], prompt=prompt, budget=budget, sinks=sinks
        )
        np.testing.assert_allclose(mine[members], want, rtol=1e-9, atol=1e-9)
        for positions, expected in zip(stored, kept[prompt - 1 :], strict=True):
            found = {p for p in positions[0, head].tolist() if p < length}
            assert found == expected


def test_the_written_h2o_evicts_something() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 20, 4)), *rng.normal(size=(2, 20, 4))
    _, kept = heavy_hitters(q, k, v, prompt=10, budget=8, sinks=2)
    assert len(kept[9]) == len(kept[-1]) == 8
    assert {0, 1, 17, 18, 19} <= kept[-1]
    assert kept[-1] != set(range(12, 20)) | {0, 1}
