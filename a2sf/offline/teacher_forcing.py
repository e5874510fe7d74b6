"""Teacher forcing with eviction: a model's predictions along a given text under a policy.

Owns the layer-by-layer scan. All positions of a layer are projected at once; only the attention
rows run in order, with the same functions as in the engine. This is exact, because a layer's
evictions do not depend on the layers above. It can also compare attention rows with and without
eviction, and scan a single layer. Knows nothing of how the predictions are evaluated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from a2sf.cache.attention import attend_causally
from a2sf.cache.passes import BlockPass, end_prompt
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.retention import RetentionRecorder, Similarity
from a2sf.cache.slots import Slots
from a2sf.engine import decoding
from a2sf.model.loader import LayerAttention, LoadedModel
from a2sf.offline.pooled import pooled_budgets
from a2sf.offline.prompts import AfterPrompts, Prompt, read
from a2sf.policy import EffectivePolicy

_Projected = tuple[Tensor, Tensor, Tensor]
"""A layer's queries [rows, H_q, width, D] and keys and values [rows, H_kv, width, D]."""


@dataclass(frozen=True)
class Example:
    """A text for teacher forcing."""

    token_ids: tuple[int, ...]
    """The whole text, prompt first."""
    prompt_tokens: int
    """Number of tokens that are prefilled by prefill_chunk; each later token is a decode step."""
    counted: tuple[int, ...]
    """The positions whose predictions are returned; position t predicts token t + 1."""

    def __post_init__(self) -> None:
        assert 1 <= self.prompt_tokens <= len(self.token_ids)
        assert all(0 <= t < len(self.token_ids) for t in self.counted)


@dataclass(frozen=True)
class Prediction:
    """A model's predictions along one example."""

    logits: Tensor
    """[counted, vocab] in float32, or float64 for float64 models."""
    similarity: Tensor | None
    """[num_layers, H_kv] float32: the cosine between a query's attention row over the retained
    tokens and its row over all earlier tokens, averaged over the counted positions and the query
    heads of a group. 1 if nothing is lost."""


@dataclass(frozen=True)
class LayerInput:
    """The input of one layer along some examples."""

    layer: int
    hidden: tuple[Tensor, ...]
    """One tensor per example, [tokens, hidden]; with given prompts only the tokens after them."""

    def stacked(self, rows: Sequence[int]) -> tuple[int, Tensor]:
        """The layer, and its input for the given examples: [rows, width, hidden]."""
        return self.layer, pad_sequence([self.hidden[row] for row in rows], batch_first=True)


def prepare(model: LoadedModel) -> None:
    """Compile the kernels for this model now, so that no later timing includes it."""
    decoding.choose_kernels("auto", model)


def predict(
    model: LoadedModel,
    examples: Sequence[Example],
    policies: Sequence[EffectivePolicy] | None,
    *,
    batch: int = 32,
    similarity: bool = False,
    layer_input: LayerInput | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> list[Prediction]:
    """Predict along each example, under its policy or (None) with the full cache.

    Args:
        model: the model.
        examples: the texts; batched internally by prefill_chunk and length.
        policies: one per example, or None for attention over all tokens.
        batch: the most examples in one forward pass.
        similarity: whether to compare attention rows; not for a full cache.
        layer_input: the result of `compute_layer_input` for a layer, under policies that agree
            below that layer. The layers below it are not run.
        prompts: the result of `read_prompts`; only if all policies have prefill_chunk 0. The
            prompts are not run. `layer_input` must then have been computed with prompts too.
    """
    found = predictions(
        model,
        examples,
        policies,
        batch=batch,
        similarity=similarity,
        layer_input=layer_input,
        prompts=prompts,
    )
    results = dict(found)
    return [results[i] for i in range(len(examples))]


def predictions(
    model: LoadedModel,
    examples: Sequence[Example],
    policies: Sequence[EffectivePolicy] | None,
    *,
    batch: int = 32,
    similarity: bool = False,
    layer_input: LayerInput | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> Iterator[tuple[int, Prediction]]:
    """As `predict`, but yields (index of the example, its prediction), in any order.

    A caller that drops each prediction before the next one needs memory for one example's logits.
    """
    for one in _passes(model, examples, policies, batch, similarity, prompts):
        start = layer_input.stacked(one.rows) if layer_input else None
        hidden = model.hidden_states(*one.inputs(), one.attention(), start)
        for at, index in enumerate(one.rows):
            yield index, one.prediction(at, hidden)


def compute_layer_input(
    model: LoadedModel,
    examples: Sequence[Example],
    policies: Sequence[EffectivePolicy] | None,
    layer: int,
    *,
    batch: int = 32,
    layer_input: LayerInput | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> LayerInput:
    """Return the input of `layer` along each example; arguments as for `predict`.

    With `layer_input` of a lower layer, only the layers between the two are run. So a caller that
    goes up layer by layer, for instance to evict in one head of each while all others keep every
    token (policies None below it), runs each layer once.
    Memory of the result: tokens of the examples x hidden x bytes of the model's dtype.
    """
    results: dict[int, Tensor] = {}
    for one in _passes(model, examples, policies, batch, False, prompts):
        start = layer_input.stacked(one.rows) if layer_input else None
        hidden = model.compute_layer_input(*one.inputs(), one.attention(), layer, start)
        for at, index in enumerate(one.rows):
            results[index] = hidden[at, : one.run(at)]
    return LayerInput(layer, tuple(results[i] for i in range(len(examples))))


def read_prompts(
    model: LoadedModel, examples: Sequence[Example], *, batch: int = 32
) -> list[Prompt]:
    """Compute each example's prompt; `prompts.nbytes` gives the memory that this takes."""
    texts = [example.token_ids[: example.prompt_tokens] for example in examples]
    return read(model, texts, batch=batch)


def walk(
    model: LoadedModel,
    examples: Sequence[Example],
    policies: Sequence[EffectivePolicy],
    layer: int,
    projected: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> Tensor:
    """Run one layer's attention under policies, which must all have the same prefill_chunk.

    Args:
        model: the model.
        examples: the texts of the rows.
        policies: one per example.
        layer: the index of the layer.
        projected: queries [rows, H_q, width, D] and keys and values [rows, H_kv, width, D]; keys
            and queries are rotated; padded at the right.
        scale: factor on the logits.

    Returns:
        The attention output [rows, H_q, width, D]; undefined for padding.
    """
    scan = _Scan.over(model, examples, policies, policies[0].prefill_chunk, None)
    return scan(layer, *projected, scale)


@dataclass(frozen=True)
class _Pass:
    """A batch of examples for one forward pass."""

    model: LoadedModel
    rows: list[int]
    """The indices of the examples among all."""
    examples: list[Example]
    scan: "_Scan | _Full"
    prompts: list[Prompt] | None
    """The computed prompts; then only the tokens after them are run."""

    def run(self, row: int) -> int:
        """Number of tokens of a row that are run."""
        known = self.prompts[row].tokens if self.prompts else 0
        return len(self.examples[row].token_ids) - known

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Token ids and positions of the tokens to run, as from `inputs`."""
        ids, positions = inputs(self.model, self.examples)
        if not self.prompts:
            return ids, positions
        # At least one column, even if every text ends with its prompt.
        width = max(1, *(self.run(row) for row in range(len(self.rows))))
        first = torch.tensor([[prompt.tokens] for prompt in self.prompts], device=ids.device)
        at = first + torch.arange(width, device=ids.device)
        at = at.clamp(max=ids.shape[1] - 1)
        return ids.gather(1, at), positions.gather(1, at)

    def attention(self) -> LayerAttention:
        """The attention of the tokens to run."""
        if not self.prompts:
            return without_padding(self.examples, self.scan)
        lengths = [len(example.token_ids) for example in self.examples]
        return AfterPrompts(self.scan, self.prompts, lengths)

    def prediction(self, row: int, hidden: Tensor) -> Prediction:
        """The prediction along a row, from the final hidden states [rows, width, hidden]."""
        mine = hidden[row]
        if self.prompts:
            mine = torch.cat([self.prompts[row].hidden, mine])
        precision = torch.promote_types(self.model.dtype, torch.float32)
        recorder = self.scan.recorder if isinstance(self.scan, _Scan) else None
        return Prediction(
            logits=self.model.logits(mine[list(self.examples[row].counted)]).to(precision),
            similarity=recorder.of(row) if isinstance(recorder, Similarity) else None,
        )


def _passes(
    model: LoadedModel,
    examples: Sequence[Example],
    policies: Sequence[EffectivePolicy] | None,
    batch: int,
    similarity: bool,
    prompts: Sequence[Prompt] | None,
) -> Iterator[_Pass]:
    """Yield batches of examples with the same prefill_chunk, and their attention."""

    def chunk(index: int) -> int:
        return policies[index].prefill_chunk if policies else 0

    order = sorted(range(len(examples)), key=lambda i: (chunk(i), len(examples[i].token_ids)))
    for prefill_chunk, group in groupby(order, key=chunk):
        assert prompts is None or prefill_chunk == 0, "prompts need an exact prefill"
        members = list(group)
        for first in range(0, len(members), batch):
            rows = members[first : first + batch]
            part = [examples[i] for i in rows]
            scan: _Scan | _Full = _Full()
            if policies:
                recorder = Similarity([example.counted for example in part]) if similarity else None
                mine = [policies[i] for i in rows]
                scan = _Scan.over(model, part, mine, prefill_chunk, recorder)
            yield _Pass(model, rows, part, scan, [prompts[i] for i in rows] if prompts else None)


def inputs(model: LoadedModel, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return token ids of examples, padded at the right, and positions: both [rows, width].

    A row is padded with its last token: for another token the model might return NaN.
    """
    width = max(len(e.token_ids) for e in examples)
    rows = [(*e.token_ids, *e.token_ids[-1:] * (width - len(e.token_ids))) for e in examples]
    ids = torch.tensor(rows)
    positions = torch.arange(width).expand(len(examples), -1)
    return ids.to(model.device), positions.to(model.device)


def without_padding(examples: Sequence[Example], attention: LayerAttention) -> LayerAttention:
    """Wrap `attention` so that queries, keys and values of padding are zero.

    The model's values for padding may be NaN. Attention multiplies a masked token by 0, and 0 x NaN
    is NaN.
    """
    lengths = [len(e.token_ids) for e in examples]
    if len(set(lengths)) == 1:
        return attention

    def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, /) -> Tensor:
        ends = torch.tensor(lengths, device=query.device)[:, None]
        padding = (torch.arange(query.shape[2], device=query.device) >= ends)[:, None, :, None]
        q, k, v = (t.masked_fill(padding, 0.0) for t in (query, keys, values))
        return attention(layer, q, k, v, scale)

    return attend


class _Full:
    """Causal attention without eviction. Padding is at the right: no real token attends to it."""

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        return attend_causally(query, keys, values, scale)


@dataclass(frozen=True)
class _Scan:
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
        examples: Sequence[Example],
        policies: Sequence[EffectivePolicy],
        prefill_chunk: int,
        recorder: RetentionRecorder | None,
    ) -> "_Scan":
        prompts = [0 if prefill_chunk == 1 else e.prompt_tokens for e in examples]
        lengths = [len(e.token_ids) for e in examples]
        longest_prompt = max(prompts)
        steps = max(n - prompt for n, prompt in zip(lengths, prompts, strict=True))
        layers = [*zip(*(p.local_budgets for p in policies), strict=True)]
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
        if not self.evicts[layer] and not self.recorder:
            # Without evictions the law is plain attention.
            return _Full()(layer, query, keys, values, scale)
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
