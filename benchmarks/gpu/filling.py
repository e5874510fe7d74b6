"""Fills rows of this engine as if they had read a long prompt.

Owns the contents of a row (random keys, values and scores at positions that the law could have
kept), the compared policies, and rows that decode together. Knows nothing of peers or of what is
measured.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from a2sf.cache.budgets import resolve
from a2sf.cache.slots import Slots
from a2sf.engine import decoding
from a2sf.engine.config import Kernels
from a2sf.model.loader import LoadedModel
from a2sf.policy import CachePolicy, EffectivePolicy, Heads
from a2sf.schema import TablePolicy

SINKS = 4
PROTECTED_SHARE = 8
"""One slot in this many of a budget is for the most recent tokens."""

TABLE_ALPHAS = (0.0, 0.5, 0.9, 0.99, 0.999)


def policies(model: LoadedModel, budget: int, longest: int) -> dict[str, EffectivePolicy]:
    """Return the policies to compare: one alpha, a table with one per head, and a window."""
    shape = model.shape
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(
        len(TABLE_ALPHAS), (shape.num_layers, shape.num_kv_heads), generator=rng
    ).tolist()
    recent = budget // PROTECTED_SHARE
    table = TablePolicy(
        alpha=tuple(tuple(TABLE_ALPHAS[i] for i in row) for row in drawn),
        head_share=((1.0,) * shape.num_kv_heads,) * shape.num_layers,
        budget=budget,
        recent=recent,
        sinks=SINKS,
        prefill_chunk=0,
    )

    def made(requested_policy: CachePolicy, fitted: TablePolicy | None = None) -> EffectivePolicy:
        return resolve(
            requested_policy,
            table=fitted,
            server=CachePolicy(),
            length=longest,
            slots=max(longest, budget),
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
        )

    return {
        "a2sf": made(CachePolicy(alpha=0.9, budget=budget, recent=recent, sinks=SINKS)),
        "table": made(CachePolicy(), table),
        "window": made(CachePolicy(preset="window", budget=budget, sinks=SINKS)),
        "full": made(CachePolicy(preset="full")),
    }


def source_row(model: LoadedModel, policy: EffectivePolicy, seen: int, seed: int = 0) -> Slots:
    """Make one row that has read `seen` tokens: each head keeps the protected and random others.

    Each head draws a random rank for every token and keeps the highest ones; protected tokens rank
    above all others.
    """
    shape, device = model.shape, model.device
    counts = counts_of(policy, seen)
    most = max(map(max, counts))
    rng = torch.Generator(device).manual_seed(seed)
    slots = Slots.empty(
        rows=1,
        slots=tuple((most,) * len(row) for row in counts),
        head_dim=shape.head_dim,
        dtype=model.dtype,
        device=device,
    )
    at = torch.arange(seen, device=device)
    for layer, (row, recents) in enumerate(zip(counts, policy.head_recents, strict=True)):
        for head, (count, recent) in enumerate(zip(row, recents, strict=True)):
            rank = torch.rand(seen, generator=rng, device=device)
            rank[(at < policy.sinks) | (at >= seen - recent)] = 2.0
            kept = rank.topk(count).indices
            slots.whole.position[layer, 0, head, :count] = kept.int()
            slots.whole.score[layer, 0, head, :count].uniform_(generator=rng)
        for vectors in (slots.keys, slots.values):
            vectors[layer].normal_(generator=rng)
    return slots


def counts_of(policy: EffectivePolicy, seen: int) -> Heads:
    """Tokens that each head holds after a row has read `seen` tokens."""
    return tuple(tuple(min(seen, budget) for budget in row) for row in policy.head_budgets)


class Rows:
    """Rows that decode together, greedily, with the same policy and contents."""

    def __init__(
        self, model: LoadedModel, rows: int, slots: int, *, graphs: bool, kernels: str = "auto"
    ) -> None:
        """Allocate the slab and, on CUDA devices, capture the graphs if asked."""
        shape = model.shape
        self.model = model
        self.rows = rows
        self.slab = Slots.empty(
            rows=rows,
            slots=((slots,) * shape.num_kv_heads,) * shape.num_layers,
            head_dim=shape.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        asked: Kernels = "torch" if kernels == "torch" else "auto"
        self.kernels = decoding.choose_kernels(asked, model)
        on_gpu = model.device.type == "cuda"
        self.decoder = decoding.make_decoder(
            model, self.slab, self.kernels, graphs=graphs and on_gpu
        )
        self.positions: list[int] = []
        self.tokens: list[int] = []
        self.policy: EffectivePolicy | None = None
        self._sources: dict[tuple[object, ...], Slots] = {}

    def fill(self, policy: EffectivePolicy, seen: int) -> None:
        """Fill every row with a copy of a row that has read `seen` tokens."""
        key = (policy.head_budgets, policy.head_recents, policy.sinks, seen)
        if key not in self._sources:
            self._sources = {key: source_row(self.model, policy, seen)}
        counts = counts_of(policy, seen)
        for row in range(self.rows):
            # The largest length is far above the budget, so the policy acts as for a sequence that
            # exceeds its budget, however many tokens a turn writes.
            self.decoder.join(row, self._sources[key], 0, counts, policy, seen + 10**6)
        self.policy = policy
        self.positions = [seen] * self.rows
        self.tokens = [row % self.model.shape.vocab_size for row in range(self.rows)]

    def step(self) -> None:
        """Decode a token of every row and bring it to the host, as a stream needs it."""
        logits: Tensor = self.decoder.step(self.tokens, self.positions)
        self.tokens = logits.argmax(dim=-1).tolist()
        self.positions = [position + 1 for position in self.positions]

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of the slab."""
        return self.slab.nbytes


def kv_step_bytes(model: LoadedModel, policy: EffectivePolicy, seen: Sequence[int]) -> int:
    """The least bytes of KV memory that a decode step touches, each once.

    Keys and values of the slots in use, and of each slot the position (read) and the score (read,
    and written if scores accumulate): 12 bytes, or 8. The logits' scratch of 4 bytes per slot and
    query head is not counted, because it stays in the L2 cache.
    """
    slot = 2 * model.shape.head_dim * model.dtype.itemsize + (12 if policy.scored else 8)
    slots = sum(min(at + 1, b) for at in seen for row in policy.head_budgets for b in row)
    return slots * slot
