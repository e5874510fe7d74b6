"""Decodes rows together on a GPU, with fused kernels in CUDA graphs.

Owns the tensors that a captured step reads and writes at fixed addresses (tokens, policies, plans,
scratch) and the graphs, one for each of a few batch sizes. Other batch sizes run in the next larger
graph; a padding row holds one token, and its output is ignored. Knows nothing of requests or of
when a row starts and ends. Needs Triton (extra `gpu`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from a2sf.cache.kernels.decode import Workspace, decode_attention, plan_slots
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots
from a2sf.model.loader import LoadedModel
from a2sf.policy import EffectivePolicy, Heads

WARM_UPS = 2
"""Steps before a capture. They compile the programs and let libraries allocate scratch memory;
neither may happen during a capture."""


def batch_sizes(most: int) -> list[int]:
    """Return the batch sizes that get a graph: powers of two, and `most`.

    Padding is cheap: the matrix products read the weights once for any number of rows.
    """
    powers = [1 << n for n in range(most.bit_length())]
    return sorted({*(size for size in powers if size <= most), most})


@dataclass
class GraphBatch:
    """The tensors and graphs of one batch size, at fixed addresses."""

    slots: Slots
    policy: PolicyTensors
    plan: Tensor
    """[layers, size, H_kv] int64: the slots of the next tokens."""
    inputs: Tensor
    """[2, size] int64: the tokens and their positions."""
    workspace: Workspace
    graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=dict)
    """Key: whether any row is scored. Value: the graph, and the logits [size, vocab] it writes."""

    @classmethod
    def of(
        cls, size: int, slab: Slots, policy: PolicyTensors, plan: Tensor, query_heads: int
    ) -> Self:
        """Allocate the tensors of batch size `size`; the others are views of the arguments."""
        rows = slice(0, size)
        slots = slab.view(rows)
        return cls(
            slots=slots,
            policy=policy.rows(rows),
            plan=plan[:, rows],
            inputs=torch.zeros(2, size, dtype=torch.int64, device=plan.device),
            workspace=Workspace.empty(slots, query_heads),
        )


class FusedDecoder:
    """Decodes with one or two kernels per layer, in addition to the model's own operations.

    A step needs no device sync. Each step chooses the tokens that the next step evicts. For a row
    that joins or moves, the choice is made before its first step.
    """

    def __init__(self, model: LoadedModel, slab: Slots, *, graphs: bool) -> None:
        """Allocate what steps need and capture the graphs, which takes seconds.

        Args:
            model: its device and dtype must be supported, see `kernels.problem`.
            slab: the rows; the first ones are in use.
            graphs: whether to capture graphs; only on CUDA devices.
        """
        self._model = model
        self._slab = slab
        rows, (layers, kv_heads) = len(slab.position), slab.head_locations.width.shape
        self._policy = PolicyTensors.idle(layers, rows, kv_heads, slab.position.device)
        self._plan = torch.zeros(
            layers, rows, kv_heads, dtype=torch.int64, device=slab.position.device
        )
        self._scored = [False] * rows
        self._unplanned: set[int] = set()
        """Rows that joined or moved, and whose plan must be made before the next step."""
        query_heads = model.shape.num_attention_heads
        self._graph_batches = {
            size: GraphBatch.of(size, slab, self._policy, self._plan, query_heads)
            for size in batch_sizes(rows)
        }
        if graphs:
            # A capture uses the current device, not the device of the tensors.
            with torch.cuda.device(model.device):
                self._capture()

    def join(
        self,
        row: int,
        source: Slots,
        source_row: int,
        counts: Heads,
        policy: EffectivePolicy,
        max_len: int,
    ) -> None:
        """As `decoding.Decoder.join`."""
        self._slab.copy_row(row, source, source_row, counts)
        one = PolicyTensors.stack([policy], [max_len], self._model.device, self._model.heads)
        self._policy.copy_row(row, one, 0)
        self._scored[row] = one.any_scored
        self._unplanned.add(row)

    def move(self, row: int, source: int) -> None:
        """As `decoding.Decoder.move`."""
        self._slab.move_row(row, source)
        self._policy.copy_row(row, self._policy, source)
        self._scored[row] = self._scored[source]
        self._unplanned.add(row)

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """As `decoding.Decoder.step`."""
        rows = len(token_ids)
        for row in self._unplanned:
            if row < rows:
                self._choose_slots(row, positions[row])
        self._unplanned.clear()
        size = min(size for size in self._graph_batches if size >= rows)
        batch = self._graph_batches[size]
        idle = [0] * (size - rows)
        batch.inputs.copy_(torch.tensor([[*token_ids, *idle], [*positions, *idle]]))
        scored = any(self._scored[:rows])
        if scored in batch.graphs:
            graph, logits = batch.graphs[scored]
            graph.replay()
        else:
            logits = self._run(batch, scored)
        return logits[:rows]

    def _choose_slots(self, row: int, position: int) -> None:
        one = slice(row, row + 1)
        slots = self._slab.view(one)
        start = torch.tensor([position], device=self._plan.device)
        self._plan[:, one] = plan_slots(slots, self._policy.rows(one), start)

    def _run(self, batch: GraphBatch, scored: bool) -> Tensor:
        policy = replace(batch.policy, any_scored=scored)
        ids, start = batch.inputs

        def attention(
            layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
        ) -> Tensor:
            return decode_attention(
                query,
                keys,
                values,
                slots=batch.slots,
                layer=layer,
                policy=policy,
                start=start,
                plan=batch.plan,
                scale=scale,
                workspace=batch.workspace,
            )

        hidden = self._model.hidden_states(ids[:, None], start[:, None], attention)
        return self._model.logits(hidden[:, -1])

    def _capture(self) -> None:
        # The largest first, so that the smaller graphs reuse its memory.
        pool = torch.cuda.graph_pool_handle()
        for size in sorted(self._graph_batches, reverse=True):
            batch = self._graph_batches[size]
            for scored in (False, True):
                aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    for _ in range(WARM_UPS):
                        self._run(batch, scored)
                torch.cuda.current_stream().wait_stream(aside)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    logits = self._run(batch, scored)
                batch.graphs[scored] = (graph, logits)
        # The warm-up steps have written tokens into the rows.
        self._slab.clear()
