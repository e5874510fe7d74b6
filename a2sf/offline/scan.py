"""One layer's attention along a batch of texts: prompt blocks, then token after token.

Owns `Scan`, which runs the block law with the same functions as the engine, and `FullCache`, the
attention without eviction. Both are a `LayerAttention`. Knows nothing of the forward pass around
them, or of what the texts are for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from a2sf.cache.attention import attend_causally
from a2sf.cache.passes import BlockPass, end_prompt
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.retention import RetentionRecorder
from a2sf.cache.slots import Slots
from a2sf.engine import decoding
from a2sf.model.loader import LoadedModel
from a2sf.offline.pooled import pooled_budgets
from a2sf.policy import EffectivePolicy

_Projected = tuple[Tensor, Tensor, Tensor]
"""A layer's queries [rows, H_q, width, D] and keys and values [rows, H_kv, width, D]."""


class FullCache:
    """Causal attention without eviction. Padding is at the right: no real token attends to it."""

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """As `attend_causally`, in any layer."""
        return attend_causally(query, keys, values, scale)


@dataclass(frozen=True)
class Scan:
    """The block law along a batch of texts: prompt blocks, then one token at a time."""

    policy: PolicyTensors
    prompt: Tensor
    """[rows] int64: tokens that run in blocks; 0 if prefill_chunk is 1, because such blocks are
    decode steps."""
    lengths: Tensor
    """[rows] int64: tokens of the whole texts."""
    chunk: int
    """Tokens of a prompt block, never 0: for an exact prefill, the length of the longest prompt."""
    block_slots: tuple[int, ...]
    """[layers] number of slots that the prompt's blocks need."""
    max_len: int
    """Tokens of the longest text, or a few more."""
    evicts: tuple[bool, ...]
    """[layers] whether any head of any row has fewer slots than its text has tokens."""
    recorder: RetentionRecorder | None
    kernels: decoding.Backend
    pooled: tuple[float | None, ...]
    """[rows] the floor for `pooled_budgets` at the end of the prompt, or None."""

    @classmethod
    def over(
        cls,
        model: LoadedModel,
        policies: Sequence[EffectivePolicy],
        sizes: Sequence[tuple[int, int]],
        recorder: RetentionRecorder | None,
    ) -> Self:
        """Return the scan over texts.

        Args:
            model: the model.
            policies: one per text; all have the same prefill_chunk.
            sizes: the tokens of each text's prompt, and of the whole text.
            recorder: records which tokens each query could attend to, or None.
        """
        prefill_chunk = policies[0].prefill_chunk
        prompts = [0 if prefill_chunk == 1 else prompt for prompt, _ in sizes]
        lengths = [length for _, length in sizes]
        longest_prompt = max(prompts)
        steps = max(n - prompt for n, prompt in zip(lengths, prompts, strict=True))
        layers = [*zip(*(p.head_budgets for p in policies), strict=True)]
        budgets = [max(map(max, mine)) for mine in layers]
        evicts = [
            any(min(row) < length for row, length in zip(mine, lengths, strict=True))
            for mine in layers
        ]
        chunk = max(min(prefill_chunk or longest_prompt, longest_prompt), 1)
        # A row with a shorter prompt waits for its last trim while longer prompts append blocks.
        # These blocks are padding in that row, but they still need slots.
        one_block = chunk == longest_prompt
        waiting = [min(longest_prompt, budget - 1 + chunk) for budget in budgets]
        return cls(
            policy=PolicyTensors.stack(policies, lengths, model.device),
            prompt=torch.tensor(prompts, device=model.device),
            lengths=torch.tensor(lengths, device=model.device),
            chunk=chunk,
            block_slots=tuple(
                longest_prompt if one_block else stored + chunk for stored in waiting
            ),
            max_len=longest_prompt + steps,
            evicts=tuple(evicts),
            recorder=recorder,
            kernels=decoding.choose_kernels("auto", model),
            pooled=tuple(policy.pooled_floor for policy in policies),
        )

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Attend in one layer, as a `LayerAttention`; undefined for padding."""
        if not self.evicts[layer] and not self.recorder:
            # Without evictions the law is plain attention.
            return FullCache()(layer, query, keys, values, scale)
        policy = self.policy.layer(layer)
        rows, heads, width, dim = query.shape
        # In the memory layout that the model reads: the heads of a token are adjacent.
        output = query.new_zeros(rows, width, heads, dim).transpose(1, 2)
        if self.recorder:
            self.recorder.begin(keys)
        projected = (query, keys, values)
        slots, policy = self._prompts(layer, policy, projected, scale, output)
        decoding.walk_texts(
            self.kernels,
            slots,
            policy,
            projected,
            scale,
            start=self.prompt,
            end=self.lengths,
            output=output,
            recorder=self.recorder,
        )
        if self.recorder:
            self.recorder.end(query, keys, scale)
        return output

    def _prompts(
        self,
        layer: int,
        policy: PolicyTensors,
        projected: _Projected,
        scale: float,
        output: Tensor,
    ) -> tuple[Slots, PolicyTensors]:
        """Run the prompts' blocks; writes to `output` [rows, H_q, width, D].

        Returns each row's slots afterwards, and the policies for decoding.
        """
        keys = projected[1]
        staging = self._empty(keys, (self.block_slots[layer],) * keys.shape[1])
        used = torch.zeros_like(policy.budget)
        for first in range(0, int(self.prompt.max()), self.chunk):
            tile = slice(first, first + self.chunk)
            block = BlockPass(
                staging,
                policy,
                start=torch.full_like(self.prompt, first),
                lengths=(self.prompt - first).clamp(0, self.chunk),
                used=used,
                width=keys[:, :, tile].shape[2],
                in_order=self.chunk == self.block_slots[layer],
                attention=decoding.block_attention(self.kernels),
            )
            q, k, v = (t[:, :, tile] for t in projected)
            output[:, :, first : first + q.shape[2]] = block(0, q, k, v, scale)
            used = block.used_after
            if self.recorder:
                self.recorder.block(first, self.chunk, staging)
        if any(floor is not None for floor in self.pooled):
            budgets = pooled_budgets(staging, self.prompt, policy, self.pooled)
            policy = replace(policy, budget=budgets)
        used = end_prompt(staging, used, self.prompt, policy)
        # The largest budget of each head, but no more than the longest text.
        most = policy.budget[0].amax(dim=0).clamp(max=self.max_len)
        slots = self._empty(keys, tuple(most.tolist()))
        for row, counts in enumerate(used[0].tolist()):
            slots.copy_row(row, staging, row, [counts])
        return slots, policy

    @staticmethod
    def _empty(like: Tensor, slots: tuple[int, ...]) -> Slots:
        rows, _, _, dim = like.shape
        return Slots.empty(
            rows=rows,
            slots=(slots,),
            head_dim=dim,
            dtype=like.dtype,
            device=like.device,
        )
