"""The kernels compile for GPUs, on machines without one.

The interpreter accepts code that the compiler refuses: shapes that are not powers of two,
operations that a GPU lacks. These tests cannot check speed or the order of memory operations.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")

ARCHITECTURES = (80, 90)

SHARED_BYTES = 99 * 1024
"""Largest shared memory per program, in bytes, on the smallest GPUs of each capability."""

POINTERS = {
    "*i64": "plan start budget recent sinks random_seed first_head query_position first_counted"
    " order vectors marks width end",
    "*i32": "position",
    "*u8": "visible",
    "*fp64": "alpha",
    "*fp32": "score logits lse split_lse split_output weights normalisers sums",
}
TABLES = {name: kind for kind, names in POINTERS.items() for name in names.split()}
MODELS = ("query", "new_keys", "new_values", "keys", "values", "output")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_program_compiles_without_spilling(architecture: int, tmp_path: Path) -> None:
    # In a separate process, because Triton may be interpreting in this one.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, str(architecture)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=380,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10 + 3 * 7
    for line in lines:
        shared, stack = map(int, line.split()[-2:])
        assert shared <= SHARED_BYTES, line
        # float32 has no tensor cores, and is not served there.
        assert stack == 0 or "torch.float32" in line, line


def compile_all(architecture: int) -> None:
    """Print one line per program: its name, and its bytes of shared memory and of stack."""
    import torch
    import triton

    from a2sf.cache.kernels import decode, decode_programs, prefill, prefill_programs, triton_walk
    from a2sf.cache.kernels import triton_walk_programs as walking

    models = [
        (torch.bfloat16, 128, 4, 1, True),
        (torch.bfloat16, 80, 1, 16, True),
        (torch.bfloat16, 256, 7, 1, True),
        (torch.float16, 64, 8, 32, False),
        (torch.float16, 96, 2, 1, False),
        (torch.float32, 256, 1, 1, True),
        (torch.float32, 32, 4, 2, True),
    ]
    for dtype, dim, group, splits, scored in models:
        constants = {
            "KV_HEADS": 8,
            "GROUP": group,
            "GROUP_PAD": 16,
            "DIM": dim,
            "DIM_PAD": triton.next_power_of_2(dim),
            "BLOCK": decode.tile_slots(dim, dtype),
            "SCORE_BLOCK": decode.SCORE_BLOCK,
            "SPLITS": splits,
            "SPLITS_PAD": triton.next_power_of_2(splits),
            "SCORED": scored,
            "QUERIES": prefill.QUERIES,
            "SLOTS": prefill.tile_slots(dim),
            "RECORDED": group == 4,
        }
        decoding = (decode_programs.attend, decode_programs.close)[: 1 + (splits > 1)]
        for program, stages, warps in (
            *((program, decode.NUM_STAGES, decode.NUM_WARPS) for program in decoding),
            (prefill_programs.normalise, prefill.NUM_STAGES, prefill.NUM_WARPS),
            (prefill_programs.sum_attention, prefill.NUM_STAGES, prefill.NUM_WARPS),
            (walking.walk, triton_walk.NUM_STAGES, triton_walk.NUM_WARPS),
        ):
            compiled = compile_one(program, str(dtype), constants, architecture, stages, warps)
            name = f"sm_{architecture} {program.fn.__name__} {dtype} {dim} {group} {splits}"
            if program is walking.walk:
                # It loads values that it has stored, so it must not use the read-only cache.
                assert ".nc" not in compiled.asm["ptx"], name
            print(name, compiled.metadata.shared, stack_bytes(compiled.asm["cubin"]))


def compile_one(
    program: object, dtype: str, constants: dict, architecture: int, stages: int, warps: int
) -> object:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    model = {"torch.bfloat16": "*bf16", "torch.float16": "*fp16", "torch.float32": "*fp32"}[dtype]
    names = program.arg_names
    types, aligned = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            types[name] = "constexpr"
        elif name == "width" and "order" not in names:
            # Here the width of a block's queries; elsewhere a table of the heads' slots.
            types[name] = "i32"
        elif name in MODELS:
            split = name == "output" and "split_output" not in names and constants["SPLITS"] > 1
            types[name] = "*fp32" if split else model
        else:
            types[name] = TABLES.get(name, "fp32" if name == "scale" else "i32")
        # As at run time: the alignment of the slab's sizes.
        if name in MODELS or name.endswith(("_row", "_head", "_token")):
            aligned[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(
            program,
            types,
            {(names.index(k),): v for k, v in constants.items() if k in names},
            aligned,
        ),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
    )


def stack_bytes(cubin: bytes) -> int:
    """Bytes that a program spills out of registers."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    (stack,) = (w for w in (used.stdout + used.stderr).split() if w.startswith("STACK:"))
    return int(stack.removeprefix("STACK:"))


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
