"""Teacher forcing through eviction: what a model predicts along a given text under a policy.

Owns the layer-by-layer scan: every position of a layer is projected at once, and only its
attention rows are walked in order, by the very functions that the engine decodes with. That is
exact, because a layer's evictions depend on nothing above it. On request it also says how much of
each attention row eviction has left. Knows nothing of what the predictions are compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from a2sf import attention
from a2sf.attention import Block
from a2sf.cache import LayerSlots, PolicyTensors
from a2sf.models import LoadedModel
from a2sf.policy import EffectivePolicy


@dataclass(frozen=True)
class Example:
    """One text to run along."""

    token_ids: tuple[int, ...]
    """The whole text, prompt first."""
    prompt_tokens: int
    """So many tokens are prefilled by prefill_chunk; each later one is a decode step."""
    counted: tuple[int, ...]
    """The positions whose predictions are wanted; position t predicts token t + 1."""

    def __post_init__(self) -> None:
        assert 1 <= self.prompt_tokens <= len(self.token_ids)
        assert all(0 <= t < len(self.token_ids) for t in self.counted)


@dataclass(frozen=True)
class Prediction:
    """What a model says along one example."""

    logits: Tensor
    """[counted, vocab] in float32, or float64 for float64 models."""
    similarity: Tensor | None
    """[num_layers, H_kv] float32, mean over the counted positions and the query heads of a group:
    the cosine between the attention row over the kept tokens and the row that the same query pays
    to all tokens before it. 1 where nothing is lost."""


def predict(
    model: LoadedModel,
    examples: Sequence[Example],
    policies: Sequence[EffectivePolicy] | None,
    *,
    batch: int = 32,
    similarity: bool = False,
) -> list[Prediction]:
    """Predict along each example, under its policy or (None) with the full cache.

    Args:
        model: the model.
        examples: the texts; they are batched inside, by prefill_chunk and length.
        policies: one an example, or None for plain attention over everything.
        batch: the most examples in one forward pass.
        similarity: whether to compare attention rows; a full cache has nothing to compare.
    """

    def chunk(index: int) -> int:
        return policies[index].prefill_chunk if policies else 0

    order = sorted(range(len(examples)), key=lambda i: (chunk(i), len(examples[i].token_ids)))
    results: dict[int, Prediction] = {}
    for prefill_chunk, group in groupby(order, key=chunk):
        members = list(group)
        for first in range(0, len(members), batch):
            rows = members[first : first + batch]
            part = [examples[i] for i in rows]
            scan: _Scan | _Full = _Full()
            if policies:
                kept = _Similarity(part) if similarity else None
                scan = _Scan.over(model, part, [policies[i] for i in rows], prefill_chunk, kept)
            results.update(zip(rows, _forward(model, part, scan), strict=True))
    return [results[i] for i in range(len(examples))]


def _forward(
    model: LoadedModel, examples: Sequence[Example], scan: "_Scan | _Full"
) -> list[Prediction]:
    width = max(len(e.token_ids) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
    positions = torch.arange(width).expand(len(examples), -1)
    hidden = model.hidden_states(ids.to(model.device), positions.to(model.device), scan)
    precision = torch.promote_types(model.dtype, torch.float32)
    watched = scan.similarity if isinstance(scan, _Scan) else None
    return [
        Prediction(
            logits=model.logits(hidden[row, list(example.counted)]).to(precision),
            similarity=None if watched is None else watched.of(row),
        )
        for row, example in enumerate(examples)
    ]


class _Similarity:
    """Which tokens each query of a layer could see, and how much of its full row they make up."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._counted = [list(example.counted) for example in examples]
        self._kept = torch.empty(0)
        self._layers: list[list[Tensor]] = []

    def begin(self, keys: Tensor) -> None:
        """Begin a layer of keys [rows, H_kv, width, D]."""
        rows, kv_heads, width, _ = keys.shape
        # One more place each way takes what lies beyond: padding's queries, empty slots.
        shape = (rows, kv_heads, width + 1, width + 1)
        self._kept = torch.zeros(shape, dtype=torch.bool, device=keys.device)

    def block(self, first: int, tokens: int, slots: LayerSlots) -> None:
        """Note what the queries at first .. first + tokens - 1 of every row were given."""
        self._kept[:, :, first : first + tokens] = self._stored(slots)[:, :, None]

    def step(self, at: Tensor, slots: LayerSlots) -> None:
        """Note what the one query of each row, at position `at` [rows], was given."""
        rows = torch.arange(len(at), device=at.device)
        query = at.clamp(max=self._kept.shape[2] - 1)
        self._kept[rows, :, query] = self._stored(slots)

    def _stored(self, slots: LayerSlots) -> Tensor:
        width = self._kept.shape[-1]
        stored = torch.zeros_like(self._kept[:, :, 0])
        return stored.scatter_(2, slots.position.clamp(max=width - 1).long(), True)

    def end(self, query: Tensor, keys: Tensor, scale: float) -> None:
        """Compare the rows of a layer: query [rows, H_q, width, D], keys [rows, H_kv, width, D]."""
        kv_heads, width = keys.shape[1:3]
        group = query.shape[1] // kv_heads
        means = []
        for row, counted in enumerate(self._counted):
            at = torch.tensor(counted, device=keys.device)
            q = query[row][:, at].float().view(kv_heads, group, len(counted), -1)
            logits = q @ keys[row][:, None].float().transpose(-1, -2) * scale
            unseen = torch.arange(width, device=keys.device) > at[:, None]
            squares = logits.masked_fill(unseen, -torch.inf).softmax(dim=-1).square()
            kept = self._kept[row][:, at, :width]
            # The kept part of a row points where the renormalised row does: cosines are the same.
            cosine = ((squares * kept[:, None]).sum(dim=-1) / squares.sum(dim=-1)).sqrt()
            means.append(cosine.mean(dim=(1, 2)))
        self._layers.append(means)

    def of(self, row: int) -> Tensor:
        """The figures of one example, [layers, H_kv]."""
        return torch.stack([layer[row] for layer in self._layers]).cpu()


class _Full:
    """Plain causal attention. Padding stands at the right, where no real token sees it."""

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        return scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )


@dataclass(frozen=True)
class _Scan:
    """The block law along a batch of texts: prompt blocks, then one token at a time."""

    policy: PolicyTensors
    prompt: Tensor
    """[rows] int64: tokens of each prompt."""
    steps: int
    """Decode steps of the longest continuation; shorter rows run on over their padding."""
    chunk: int
    """Tokens of one prompt block, never 0: an exact prompt is one block of the longest prompt."""
    block_slots: int
    """Slots that the prompt's blocks need."""
    decode_slots: int
    """Slots that the decode steps need: the largest budget."""
    similarity: _Similarity | None

    @classmethod
    def over(
        cls,
        model: LoadedModel,
        examples: Sequence[Example],
        policies: Sequence[EffectivePolicy],
        prefill_chunk: int,
        similarity: _Similarity | None,
    ) -> "_Scan":
        longest_prompt = max(e.prompt_tokens for e in examples)
        budget = max(p.budget for p in policies)
        chunk = min(prefill_chunk or longest_prompt, longest_prompt)
        # A row whose prompt is done waits for its last trim while longer ones append blocks, which
        # for it are padding but still need the room.
        one_block = chunk == longest_prompt
        waiting = min(longest_prompt, budget - 1 + chunk)
        return cls(
            policy=PolicyTensors.stack(list(policies), model.device),
            prompt=torch.tensor([e.prompt_tokens for e in examples], device=model.device),
            steps=max(len(e.token_ids) - e.prompt_tokens for e in examples),
            chunk=chunk,
            block_slots=longest_prompt if one_block else waiting + chunk,
            decode_slots=budget,
            similarity=similarity,
        )

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        rows, kv_heads, width, dim = keys.shape
        slots = LayerSlots.empty(
            rows,
            kv_heads,
            max(self.block_slots, self.decode_slots),
            dim,
            keys.dtype,
            keys.device,
        )
        output = torch.zeros_like(query)
        if self.similarity:
            self.similarity.begin(keys)
        nothing = torch.zeros_like(self.prompt)
        step = Block(start=nothing, lengths=nothing, used=nothing, policy=self.policy)

        staging = slots.view(slice(None), self.block_slots)
        for first in range(0, int(self.prompt.max()), self.chunk):
            tile = slice(first, first + self.chunk)
            lengths = (self.prompt - first).clamp(0, self.chunk)
            step = replace(step, start=torch.full_like(lengths, first), lengths=lengths)
            output[:, :, tile] = attention.block(
                staging, layer, step, query[:, :, tile], keys[:, :, tile], values[:, :, tile], scale
            )
            step = replace(step, used=step.used_after)
            if self.similarity:
                self.similarity.block(first, self.chunk, staging)
        used = attention.end_prompt(staging, step.used, self.prompt, self.policy)

        window = slots.view(slice(None), self.decode_slots)
        ones = torch.ones_like(self.prompt)
        for ahead in range(self.steps):
            at = self.prompt + ahead
            index = at.clamp(max=width - 1)[:, None, None, None]
            step = Block(start=at, lengths=ones, used=used, policy=self.policy)
            q, k, v = (
                t.gather(2, index.expand(-1, t.shape[1], 1, dim)) for t in (query, keys, values)
            )
            answer = attention.decode(window, layer, step, q, k, v, scale)
            inside = (at < width)[:, None, None, None]
            previous = output.gather(2, index.expand_as(answer))
            output.scatter_(2, index.expand_as(answer), torch.where(inside, answer, previous))
            used = step.used_after
            if self.similarity:
                self.similarity.step(at, window)
        if self.similarity:
            self.similarity.end(query, keys, scale)
        return output
