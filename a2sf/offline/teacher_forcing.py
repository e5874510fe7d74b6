"""Teacher forcing with eviction: a model's predictions along a given text under a policy.

Owns the passes: which examples run together, from which layer, and with which prompts known. All
positions of a layer are projected at once; only the attention runs token by token (`scan`). This is
exact, because a layer's evictions do not depend on the layers above. It can also compare attention
rows with and without eviction, and scan a single layer. Knows nothing of how the predictions are
evaluated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from a2sf.cache.retention import Similarity
from a2sf.engine import decoding
from a2sf.model.layer_attention import LayerAttention
from a2sf.model.loader import LoadedModel
from a2sf.offline.prompts import AfterPrompts, Prompt, read
from a2sf.offline.scan import FullCache, Scan
from a2sf.policy import EffectivePolicy


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
    scan = Scan.over(model, policies, _sizes(examples), None)
    return scan(layer, *projected, scale)


@dataclass(frozen=True)
class _Pass:
    """A batch of examples for one forward pass."""

    model: LoadedModel
    rows: list[int]
    """The indices of the examples among all."""
    examples: list[Example]
    scan: Scan | FullCache
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
        recorder = self.scan.recorder if isinstance(self.scan, Scan) else None
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
            scan: Scan | FullCache = FullCache()
            if policies:
                recorder = Similarity([example.counted for example in part]) if similarity else None
                mine = [policies[i] for i in rows]
                scan = Scan.over(model, mine, _sizes(part), recorder)
            yield _Pass(model, rows, part, scan, [prompts[i] for i in rows] if prompts else None)


def _sizes(examples: Sequence[Example]) -> list[tuple[int, int]]:
    return [(example.prompt_tokens, len(example.token_ids)) for example in examples]


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
