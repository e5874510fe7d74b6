"""The law on processors: the next tokens of each row through a layer, one or many, in one call.

Owns `Walker`, which hands the compiled programs the slots of some rows, their policies and what
their tokens bring. They carry out what `attention.DecodePass` does, token after token. Knows
nothing of models or requests.

A row and KV head is the work of one thread, and those that take longest begin first. Each head has
an offset and a budget of slots of its own.
"""

from functools import cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from a2sf.cache import PolicyTensors, Slots
from a2sf.kernels import compiling, walk_programs
from a2sf.kernels.walk_programs import BROUGHT, CALL, HEAD

_PROGRAMS = {
    torch.float32: walk_programs.walk_float32,
    torch.bfloat16: walk_programs.walk_bfloat16,
}

_WORTH_A_THREAD = 1 << 16
"""Numbers of keys for which one more thread is woken: reading them takes about as long as that."""

_LINE_BYTES = 64

_LINE = _LINE_BYTES // 4
"""float32 numbers of a cache line: the scratch of two threads shares none."""


@cache
def program(dtype: torch.dtype) -> int:
    """Compile the program for slots of a dtype, or load it; return its address."""
    return compiling.compiled(_PROGRAMS[dtype], walk_programs.SIGNATURE)


class Walker:
    """Carries rows through the layers of some slots; a `models.LayerAttention` once it has begun.

    One thread at a time may use it.
    """

    def __init__(self, slots: Slots, policy: PolicyTensors) -> None:
        """Take rows as they are; their policies are read here and never again.

        Args:
            slots: in float32 or bfloat16, on the processor, each head with as many slots as the
                largest budget there, or as any row will ever fill; it uses its first ones.
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
        """The threads, and the query heads a KV head, that the scratch is enough for."""
        self._kept = torch.zeros(0)
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
        """Say where each row's next token stands in its sequence, [rows] integer; returns this."""
        self._heads["start"] = start.numpy()[:, None]
        return self

    def begin_texts(self, start: Tensor, end: Tensor, kept: Tensor | None) -> None:
        """Say which tokens of texts are given, when the layers are handed whole texts.

        Args:
            start: [rows] integer, the first of each text that is to go through.
            end: [rows] integer, the first that is not.
            kept: [rows, H_kv, side, side] bool, where what query i is given is noted as true in
                place [.., i, position of the token], or None.
        """
        self._heads["start"] = self._heads["first"] = start.numpy()[:, None]
        self._heads["tokens"] = (end - start).clamp(min=0).numpy()[:, None]
        if kept is not None:
            assert kept.is_contiguous()
            assert kept.dtype == torch.bool
            self._kept = kept
            self._calls["kept"], self._calls["kept_side"] = kept.data_ptr(), kept.shape[3]
        self._share_work()

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, /
    ) -> Tensor:
        """Place the tokens one after the other, attend and accumulate; as `DecodePass`.

        Args:
            layer: the layer, counted from the first of the slots'.
            query: [rows, H_q, width, D] in the dtype of the slots, rotated; its last dimension
                contiguous. The width is 1, or that of the texts.
            keys, values: [rows, H_kv, width, D], likewise.
            scale: factor on the logits.

        Returns:
            The attention output, [rows, H_q, width, D], laid out as [rows, width, H_q, D]; zeros
            where no token went through.
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
        """As a call, writing to the places of the tokens in `output` [rows, H_q, width, D]."""
        for tensor in (query, keys, values, output):
            assert tensor.dtype == self._dtype
            assert tensor.stride(3) == 1
        threads = min(torch.get_num_threads(), self._most_threads[layer])
        group = query.shape[1] // keys.shape[1]
        if (threads, group) not in self._given:
            self._give_scratch(threads, group)
        # In the order of CALL.
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
        compiling.run(self._program, self._addresses[layer], threads)

    def _share_work(self) -> None:
        """Order the heads of each layer by what their tokens take, the most first."""
        layers = len(self._heads)
        work = (self._heads["budget"] * self._heads["tokens"]).reshape(layers, -1)
        self._order[:] = np.argsort(-work, axis=1, kind="stable")
        more = work.sum(axis=1) * self._calls["dim"] // _WORTH_A_THREAD
        self._most_threads = np.minimum(1 + more, self._calls["pairs"]).tolist()

    def _give_scratch(self, threads: int, group: int) -> None:
        """Let each thread have room for a token's logits, queries, output and normalisers."""
        room = _whole_lines(self._slots.layout.widest)
        size = _whole_lines(group * (room + 2 * int(self._calls["dim"][0]) + 1))
        self._scratch = np.empty(threads * size + _LINE, np.float32)
        calls = self._calls
        calls["scratch"] = -(-self._scratch.ctypes.data // _LINE_BYTES) * _LINE_BYTES
        calls["scratch_size"], calls["room"], calls["group"] = size, room, group
        self._given = {(fewer, group) for fewer in range(1, threads + 1)}


def _whole_lines(numbers: int) -> int:
    """So many float32 numbers, or a few more: those of whole cache lines."""
    return -(-numbers // _LINE) * _LINE


def _heads(slots: Slots, policy: PolicyTensors) -> np.ndarray:
    """Return [layers, rows, H_kv] HEAD, of one token each."""
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
        assert keys.stride()[1:] == (dim, 1), "slots of a row lie one after the other"
        heads["vectors"][layer] = row * keys.stride(0) + offsets[layer] * dim
    # A row that will never fill its budget has no more slots than it needs.
    heads["budget"] = np.minimum(policy.budget.numpy(), np.array(layout.slots)[:, None])
    heads["recent"] = policy.recent.numpy()
    heads["sinks"] = policy.sinks.numpy()[:, None]
    heads["random_seed"] = policy.random_seed.numpy()[:, None]
    heads["scored"] = policy.scored.numpy()[:, None]
    heads["number"] = policy.first_heads.numpy()[:, None, None] + head
    heads["alpha"] = policy.alpha.numpy()
    heads["tokens"] = 1
    return heads
