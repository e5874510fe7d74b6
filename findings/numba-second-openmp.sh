#!/usr/bin/env bash
# What people assume: numba's `omp` threading layer and PyTorch share one OpenMP, so that a process
#   that uses both has one pool of threads.
# What happens: PyTorch's wheel brings a libgomp in a folder of the package, and numba's layer
#   loads the system's. The process has two pools, whose threads wait for each other's processors;
#   settings such as torch.set_num_threads reach one of them alone.
# What to do: run compiled functions through `GOMP_parallel` of the library that torch has loaded.
# Versions: torch 2.13.0 (CPU build), numba 0.68.1, llvmlite 0.50.0. Date: 2026-11-30.
# Prints versions and behaviour; exits 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 numba==0.68.1 llvmlite==0.50.0
cd "$work"
venv/bin/python - 2>stderr <<'PYTHON' || { status=$?; cat stderr >&2; exit $status; }
import sys
from pathlib import Path

import numba
import numpy as np
import torch

torch.set_num_threads(1)
torch.ones(1000).sum()
numba.config.THREADING_LAYER = "omp"


@numba.njit(parallel=True)
def total(values):
    found = 0.0
    for i in numba.prange(len(values)):
        found += values[i]
    return found


total(np.ones(1000))
lines = Path("/proc/self/maps").read_text().splitlines()
loaded = sorted({Path(line.split()[-1]).name for line in lines if "gomp" in line})
print(f"torch {torch.__version__}, numba {numba.__version__}, layer {numba.threading_layer()}")
print("OpenMP libraries in the process:", loaded)
print("threads of torch and of numba:", torch.get_num_threads(), numba.get_num_threads())
sys.exit(len(loaded) != 2)
PYTHON
