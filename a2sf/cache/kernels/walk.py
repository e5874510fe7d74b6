"""The law on processors: runs one or many tokens of each row through a layer in one call.

Owns `Walker`, which calls the compiled kernels with the slots of some rows, their policies and the
projections of their tokens. The kernels compute an `passes.DecodePass` per token. Knows nothing
of models or requests.

One thread processes a row and KV head; the heads with the most work start first. Each head has its
own offset and budget.
"""

from functools import cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from a2sf.cache.kernels import walk_programs, walk_records
from a2sf.cache.kernels.walk_records import BROUGHT, CALL, HEAD
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots
from a2sf.native import compiling, memory, team

_PROGRAMS = {
    torch.float32: walk_programs.walk_float32,
    torch.bfloat16: walk_programs.walk_bfloat16,
}

_WORTH_A_THREAD = 1 << 16
"""Numbers of keys per additional thread: reading them takes about as long as waking a thread."""

_LINE_BYTES = 64

_LINE = _LINE_BYTES // 4
"""float32 numbers per cache line. The scratch memory of two threads never shares a line."""


@cache
def program(dtype: torch.dtype) -> int:
    """Compile the kernel for slots of a dtype, or load it; return its address."""
    return compiling.compiled(_PROGRAMS[dtype], uses=[walk_records, memory])


class Walker:
    """Runs tokens of rows through layers. A `LayerAttention` after `begin`.

    Not thread-safe.
    """

    def __init__(self, slots: Slots, policy: PolicyTensors) -> None:
        """Prepare the calls. The policies are read only here.

        Args:
            slots: in float32 or bfloat16, on the processor. Each head needs as many slots as the
                largest budget of that head, or as the tokens that any row will hold. A head uses
                its first slots.
            policy: the rows' policies in the same layers.
        """
        self._slots = slots
        self._dtype = slots.keys[0].dtype
        self._program = program(self._dtype)
        self._heads = _heads(slots, policy)
        layers, rows, kv_heads = self._heads.shape
        self._begun, self._working = np.zeros((2, 1), np.int64)
        self._order = np.zeros((layers, rows * kv_heads), np.int64)
        self._given: set[tuple[int, int]] = set()
        """(threads, query heads per KV head) for which the scratch memory is large enough."""
        self._retained = torch.zeros(0)
        self._calls = np.zeros(layers, CALL)
        for layer, (keys, values) in enumerate(zip(slots.keys, slots.values, strict=True)):
            call = self._calls[layer]
            call["stored_keys"], call["stored_values"] = keys.data_ptr(), values.data_ptr()
            call["score"] = slots.score.data_ptr()
            call["position"] = slots.position.data_ptr()
            call["heads"] = self._heads[layer].ctypes.data
            call["order"] = self._order[layer].ctypes.data
            call["begun"], call["working"] = self._begun.ctypes.data, self._working.ctypes.data
            call["pairs"], call["kv_heads"], call["dim"] = rows * kv_heads, kv_heads, keys.shape[2]
        numbers = self._calls.view(np.int64).reshape(layers, -1)
        self._brought, self._scale = numbers[:, :BROUGHT], self._calls["scale"]
        self._addresses = [self._calls[layer:].ctypes.data for layer in range(layers)]
        self._share_work()

    def begin(self, start: Tensor) -> Self:
        """Set the positions of the rows' next tokens, [rows] integer; return self."""
        self._heads["start"] = start.numpy()[:, None]
        return self

    def begin_texts(self, start: Tensor, end: Tensor, retained: Tensor | None) -> None:
        """Set the tokens to run, for calls with whole texts.

        Args:
            start, end: [rows] integer: the tokens start .. end - 1 of each text are run.
            retained: [rows, H_kv, side, side] bool, or None. Element [.., i, p] becomes whether
                query i could attend to the token at position p.
        """
        self._heads["start"] = self._heads["first"] = start.numpy()[:, None]
        self._heads["tokens"] = (end - start).clamp(min=0).numpy()[:, None]
        if retained is not None:
            assert retained.is_contiguous()
            assert retained.dtype == torch.bool
            self._retained = retained
            self._calls["retained"], self._calls["retained_side"] = (
                retained.data_ptr(),
                retained.shape[3],
            )
        self._share_work()

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, /
    ) -> Tensor:
        """Place the tokens one after the other, attend and accumulate, as `DecodePass`.

        Args:
            layer: the index of the layer within the slots.
            query: [rows, H_q, width, D] in the dtype of the slots, rotated; its last dimension
                contiguous. The width is 1, or that of the texts.
            keys, values: [rows, H_kv, width, D], likewise.
            scale: factor on the logits.

        Returns:
            The attention output, [rows, H_q, width, D], in memory as [rows, width, H_q, D]; zeros
            for tokens that are not run.
        """
        rows, q_heads, width, dim = query.shape
        make = query.new_empty if width == 1 else query.new_zeros
        output = make(rows, width, q_heads, dim).transpose(1, 2)
        self.into(output, layer, query, keys, values, scale)
        return output

    def into(
        self,
        output: Tensor,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
    ) -> None:
        """As `__call__`, but write the tokens' output to `output` [rows, H_q, width, D]."""
        for tensor in (query, keys, values, output):
            assert tensor.dtype == self._dtype
            assert tensor.stride(3) == 1
        threads = min(torch.get_num_threads(), self._most_threads[layer])
        group = query.shape[1] // keys.shape[1]
        if (threads, group) not in self._given:
            self._give_scratch(threads, group)
        # In the order of the fields of CALL.
        self._brought[layer] = (
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            output.data_ptr(),
            *query.stride()[:3],
            *keys.stride()[:3],
            *values.stride()[:3],
            *output.stride()[:3],
        )
        self._scale[layer] = scale
        self._begun[0] = self._working[0] = 0
        team.run(self._program, self._addresses[layer], threads)

    def _share_work(self) -> None:
        """Sort the heads of each layer by their work, the largest first."""
        layers = len(self._heads)
        work = (self._heads["budget"] * self._heads["tokens"]).reshape(layers, -1)
        self._order[:] = np.argsort(-work, axis=1, kind="stable")
        more = work.sum(axis=1) * self._calls["dim"] // _WORTH_A_THREAD
        self._most_threads = np.minimum(1 + more, self._calls["pairs"]).tolist()

    def _give_scratch(self, threads: int, group: int) -> None:
        """Allocate each thread's memory for a token's logits, queries, output and normalisers."""
        room = _whole_lines(self._slots.layout.widest)
        size = _whole_lines(group * (room + 2 * int(self._calls["dim"][0]) + 1))
        self._scratch = np.empty(threads * size + _LINE, np.float32)
        calls = self._calls
        calls["scratch"] = -(-self._scratch.ctypes.data // _LINE_BYTES) * _LINE_BYTES
        calls["scratch_size"], calls["room"], calls["group"] = size, room, group
        self._given = {(fewer, group) for fewer in range(1, threads + 1)}


def _whole_lines(numbers: int) -> int:
    """Round a count of float32 numbers up to whole cache lines."""
    return -(-numbers // _LINE) * _LINE


def _heads(slots: Slots, policy: PolicyTensors) -> np.ndarray:
    """Return [layers, rows, H_kv] HEAD, with one token each."""
    layers, rows, kv_heads = policy.alpha.shape
    layout = slots.layout
    assert slots.score.stride() == slots.position.stride()
    assert slots.score.stride(1) == 1
    row, head = np.arange(rows)[:, None], np.arange(kv_heads)
    offsets = np.array(layout.offsets)[:, None]
    heads = np.zeros((layers, rows, kv_heads), HEAD)
    heads["marks"] = row * slots.score.stride(0)
    heads["marks"] += np.array(layout.starts)[:, None, None] + offsets
    for layer, (keys, values) in enumerate(zip(slots.keys, slots.values, strict=True)):
        dim = keys.shape[2]
        assert keys.stride() == values.stride()
        assert keys.stride()[1:] == (dim, 1), "slots of a row must be contiguous"
        heads["vectors"][layer] = row * keys.stride(0) + offsets[layer] * dim
    # A row that never fills its budget may have fewer slots than its budget.
    heads["budget"] = np.minimum(policy.budget.numpy(), np.array(layout.slots)[:, None])
    heads["recent"] = policy.recent.numpy()
    heads["sinks"] = policy.sinks.numpy()[:, None]
    heads["random_seed"] = policy.random_seed.numpy()[:, None]
    heads["scored"] = policy.scored.numpy()[:, None]
    heads["number"] = policy.first_heads.numpy()[:, None, None] + head
    heads["alpha"] = policy.alpha.numpy()
    heads["tokens"] = 1
    return heads
