"""Checks before any timing: the kernels and the engine must compute what the law says.

The cases and their checks are shared with the tests (`tests/kernel_cases.py`,
`tests/prompt_cases.py`, `tests/triton_walk_cases.py`, `tests/near_ties.py`). A failed check ends
the run. Knows nothing of time except its deadline.
"""

from collections.abc import Callable
from typing import Any

import torch

from a2sf.cache.kernels import problem
from a2sf.model.loader import LoadedModel
from a2sf.requests import GenerationRequest
from benchmarks.gpu.models import CHECKED, build
from benchmarks.gpu.report import CheckFailed, NotSupported, OutOfTime
from benchmarks.gpu.run import Run
from tests.driving import any_requests, engine_for
from tests.near_ties import Recorder, Step, parting

MASS_CASES = 40
WALK_CASES = 16
FLASH = ((64, 64), (64, 200), (512, 2048))
"""Queries and slots."""

DEVIATION = 0.2
"""Standard deviation of the checked model's weights: wide, so that attention is peaked and
evictions change tokens."""

NEAR_TIE = 1e-3
"""The largest relative gap at which rounding may change a decision on a GPU, because its
exponentials and sums differ from the other side's. A wrong computation differs at gaps near 1."""

ENGINE = {"slots": 128, "max_batch": 3, "max_waiting": 1000, "step_tokens": 20}


def run_checks(run: Run) -> None:
    """Run every check. Raises CheckFailed after the last one, if any failed.

    A check that runs out of time leaves the checks incomplete; the document records this.
    """
    failures = []
    verdict = "passed"
    checks: tuple[Callable[[Run], str], ...] = (
        decode_steps,
        decode_chain,
        walks,
        prompt_masses,
        flash_attention,
        engine_kernels,
        engine_graphs,
    )
    for check in checks:
        name = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
        try:
            run.report.add(name, "passed", what=check(run))
        except NotSupported as reason:
            run.report.missed(name, reason)
        except OutOfTime as up:
            verdict = "incomplete"
            run.report.missed(name, up)
        except Exception as error:
            failures.append(name)
            run.report.missed(name, error)
    if failures:
        run.report.document["checks"] = "failed"
        raise CheckFailed(f"{len(failures)} of {len(checks)} checks failed: {'; '.join(failures)}")
    run.report.document["checks"] = verdict


def decode_steps(run: Run) -> str:
    """Compare the decode kernel with float64: outputs, scores, positions, next eviction."""
    from tests import kernel_cases
    from tests.interpreting import poisoned

    _needs_kernels(run, 64)
    with poisoned():
        for seed in range(run.sizes.cases):
            run.deadline.check()
            kernel_cases.check(*kernel_cases.served_case(seed, run.sizes.case_slots))
    return f"{run.sizes.cases} random cases, unused memory filled with NaN"


def decode_chain(run: Run) -> str:
    """Compare a long chain of evictions with a reference that is never corrected."""
    from tests import kernel_cases, row_cases
    from tests.interpreting import poisoned

    _needs_kernels(run, 128)
    group, kv_heads, dim, _ = kernel_cases.SERVED[0]
    parted = None
    with poisoned():
        case = row_cases.make(
            1,
            group=group,
            dim=dim,
            kv_heads=kv_heads,
            dtype=torch.float32,
            rows=2,
            slots=(24, 40),
            methods=("a2sf", "table"),
            seen=30,
            aligned=True,
        )
        parted = kernel_cases.check_chain(case, run.sizes.chain, 1)
    steps = run.sizes.chain if parted is None else parted
    return f"{steps} steps" + ("" if parted is None else ", then a near-tie was taken otherwise")


def walks(run: Run) -> str:
    """Compare texts walked through a layer in one launch with float64, token by token."""
    from tests import triton_walk_cases
    from tests.interpreting import poisoned

    _needs_kernels(run, 64)
    count = min(WALK_CASES, run.sizes.cases)
    parted = 0
    with poisoned():
        for seed in range(count):
            run.deadline.check()
            parted += triton_walk_cases.check(
                triton_walk_cases.served_case(seed, run.sizes.case_slots)
            )
    return f"{count} random cases, in which {parted} heads parted at a near-tie"


def prompt_masses(run: Run) -> str:
    """Compare the attention sums of a prompt, with and without known normalisers, with float64."""
    from tests.interpreting import poisoned
    from tests.kernel_cases import SERVED
    from tests.prompt_cases import check_mass

    _needs_kernels(run, 64)
    count = min(MASS_CASES, run.sizes.cases)
    with poisoned():
        for seed in range(count):
            run.deadline.check()
            kind = SERVED[seed % 2] if run.device.type == "cuda" else None
            check_mass(seed, kind, known=seed % 4 >= 2)
    return f"{count} random blocks"


def flash_attention(run: Run) -> str:
    """Compare flash attention aligned with the last slot, and its normalisers, with float64."""
    if run.device.type != "cuda":
        raise NotSupported("torch has flash attention on CUDA devices only")
    from tests.prompt_cases import check_flash

    for dtype in (torch.bfloat16, torch.float16):
        for width, slots in FLASH:
            check_flash(dtype, width, slots)
    return f"{2 * len(FLASH)} shapes, four query heads a KV head"


def engine_kernels(run: Run) -> str:
    """Compare the engine on Triton with the engine on torch's operations, request by request."""
    model = build(CHECKED, run.device, torch.float32, deviation=DEVIATION)
    _needs_kernels(run, model.shape.head_dim)
    made = any_requests(model, run.sizes.requests, seed=2, max_len=40, most=16)
    witness: dict[str, list[Step]] = {}
    for one in made:
        witness |= _steps(run, model, [one], kernels="torch")
    return _judged(witness, _steps(run, model, made, kernels="triton"))


def engine_graphs(run: Run) -> str:
    """Compare the engine with captured steps with the same engine without graphs."""
    if run.device.type != "cuda":
        raise NotSupported("CUDA graphs need a CUDA device")
    model = build(CHECKED, run.device, torch.bfloat16, deviation=DEVIATION)
    made = any_requests(model, run.sizes.requests, seed=5, max_len=30, most=25)
    launched, captured = (
        _steps(run, model, made, kernels="triton", cuda_graphs=graphs) for graphs in (False, True)
    )
    return _judged(launched, captured)


def _steps(
    run: Run, model: LoadedModel, made: list[GenerationRequest], **config: Any
) -> dict[str, list[Step]]:
    """Make completions together in an engine; return each step's kept tokens and drawn token."""
    recorder = Recorder(engine_for(model, **ENGINE, **config))
    for one in made:
        recorder.engine.submit(one)
    while recorder.engine.has_work:
        run.deadline.check()
        recorder.step()
    return recorder.steps


def _judged(witness: dict[str, list[Step]], found: dict[str, list[Step]]) -> str:
    """Count the runs that diverged. Raises CheckFailed if one diverged without a near-tie."""
    parted = 0
    for name, steps in witness.items():
        parting_there = parting(steps, found[name])
        if parting_there is not None and parting_there.gap > NEAR_TIE:
            raise CheckFailed(f"request {name}: {parting_there}")
        parted += parting_there is not None
    return f"{len(witness)} random requests, of which {parted} parted at a near-tie"


def _needs_kernels(run: Run, head_dim: int) -> None:
    reason = problem(run.device, torch.float32, head_dim)
    if reason is not None:
        raise NotSupported(f"no Triton kernels: {reason}")
