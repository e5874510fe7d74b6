"""Compiles the decode programs early, in separate processes, while the checks run.

A graph of another batch size or budget may split its rows among another number of programs. Each
number of splits is compiled separately, for seconds. The compiled programs are in Triton's cache on
disk, where the measuring process finds them. This saves time and changes nothing else.

    python -m benchmarks.gpu.ahead DEVICE HEAD_DIM:SPLITS ...
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots
from benchmarks.gpu.models import SHAPES, LlamaShape
from benchmarks.gpu.run import Cell, Run

DTYPE = torch.bfloat16

PROCESSES = max(min((os.cpu_count() or 1) - 4, 10), 1)


def needed(cells: tuple[Cell, ...], multiprocessors: int, room: int) -> list[tuple[int, int]]:
    """Return the head sizes and numbers of splits that the graphs of these cells use.

    `room` is the number of slots besides the context in a row that keeps all tokens.
    """
    from a2sf.cache.kernels.decode import choose_splits, tile_slots
    from a2sf.engine.cuda_graphs import batch_sizes

    found = set()
    for cell in cells:
        shape = SHAPES[cell.model]
        widths = [cell.budget, *([cell.context + room] if "full" in cell.peers else [])]
        for width in widths:
            tiles = -(-width // tile_slots(shape.head_dim, DTYPE))
            for rows in batch_sizes(cell.batch):
                programs = rows * shape.num_key_value_heads
                found.add((shape.head_dim, choose_splits(programs, tiles, multiprocessors)))
    return sorted(found)


@contextmanager
def compiling(run: Run) -> Iterator[None]:
    """Compile in the background; at the end, wait for it as long as the part has time."""
    if run.device.type != "cuda":
        yield
        return
    sizes = run.sizes
    count = torch.cuda.get_device_properties(run.device).multi_processor_count
    wanted = [f"{dim}:{splits}" for dim, splits in needed(all_cells(run), count, sizes.room)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.ahead", "cuda", *wanted[first::PROCESSES]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for first in range(min(PROCESSES, len(wanted)))
    ]
    try:
        yield
        for process in processes:
            process.wait(max(run.deadline.left, 0.1))
    except subprocess.TimeoutExpired:
        run.report.add("compiling ahead", "skipped", reason="did not end with the checks")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def all_cells(run: Run) -> tuple[Cell, ...]:
    """All cells in which this engine's steps are captured in graphs."""
    return (*run.sizes.cells, *run.sizes.small_cells, run.sizes.worker_cell)


def compile_for(shape: LlamaShape, splits: int, device: torch.device, dtype: torch.dtype) -> None:
    """Run both programs for a number of splits once, on minimal data."""
    from a2sf.cache.kernels.decode import Workspace, decode_attention, tile_slots

    heads, kv_heads, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    slots = Slots.empty(
        rows=1,
        slots=((splits * tile_slots(dim, dtype),) * kv_heads,),
        head_dim=dim,
        dtype=dtype,
        device=device,
    )
    policy = PolicyTensors.idle(1, 1, kv_heads, device)
    query, keys, values = (
        torch.zeros(1, n, 1, dim, dtype=dtype, device=device) for n in (heads, kv_heads, kv_heads)
    )
    for scored in (False, True):
        decode_attention(
            query,
            keys,
            values,
            slots=slots,
            layer=0,
            policy=replace(policy, any_scored=scored),
            start=torch.zeros(1, dtype=torch.int64, device=device),
            plan=torch.zeros(1, 1, kv_heads, dtype=torch.int64, device=device),
            scale=dim**-0.5,
            workspace=Workspace.empty(slots, heads, splits),
        )


def main(device: str, wanted: list[str]) -> None:
    """Compile the programs named on the command line."""
    by_dim = {shape.head_dim: shape for shape in SHAPES.values()}
    for one in wanted:
        dim, splits = map(int, one.split(":"))
        compile_for(by_dim[dim], splits, torch.device(device), DTYPE)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
