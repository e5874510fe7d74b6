"""What must hold before anything is timed: the kernels and the engine compute what the law says.

The cases and their judges are the tests' own (`tests/kernel_cases.py`, `tests/near_ties.py`). A
check that fails ends the run. Knows nothing of time but its deadline.
"""

from collections.abc import Callable

import torch

from a2sf.attention import attend
from a2sf.kernels import problem
from a2sf.models import LoadedModel
from benchmarks.gpu.models import CHECKED, build
from benchmarks.gpu.report import CheckFailed, NotSupported, OutOfTime
from benchmarks.gpu.run import Run
from tests.driving import any_requests, engine_for, tokens
from tests.driving import run as run_engine
from tests.near_ties import TOLERANCE, Recorder, parting

MASS_CASES = 40
FLASH = ((64, 64), (64, 200), (512, 2048))
"""Queries and slots."""

ENGINE = {"slots": 64, "max_batch": 3, "max_waiting": 1000, "step_tokens": 20}


def run_checks(run: Run) -> None:
    """Carry every check out. Raises CheckFailed after the last one, if any failed.

    One that runs out of time leaves the checks incomplete, which the document says.
    """
    failures = []
    verdict = "passed"
    checks: tuple[Callable[[Run], str], ...] = (
        decode_steps,
        decode_chain,
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
    """Decode kernel against float64: outputs, scores, positions, and who is evicted next."""
    from tests import kernel_cases

    _needs_kernels(run, 64)
    with kernel_cases.poisoned():
        for seed in range(run.sizes.cases):
            run.deadline.check()
            kernel_cases.check(*kernel_cases.served_case(seed, run.sizes.case_slots))
    return f"{run.sizes.cases} random cases, unused memory filled with NaN"


def decode_chain(run: Run) -> str:
    """A long chain of evictions beside a reference that is never corrected."""
    from tests import kernel_cases

    _needs_kernels(run, 128)
    group, kv_heads, dim, _ = kernel_cases.SERVED[0]
    parted = None
    with kernel_cases.poisoned():
        case = kernel_cases.make(
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


def prompt_masses(run: Run) -> str:
    """What a prompt's queries pay, with and without known normalisers, against float64."""
    from tests import kernel_cases

    _needs_kernels(run, 64)
    count = min(MASS_CASES, run.sizes.cases)
    with kernel_cases.poisoned():
        for seed in range(count):
            run.deadline.check()
            kind = kernel_cases.SERVED[seed % 2] if run.device.type == "cuda" else None
            kernel_cases.check_mass(seed, kind, known=seed % 4 >= 2)
    return f"{count} random blocks"


def flash_attention(run: Run) -> str:
    """Flash attention aligned with the last slot, and its normalisers, against float64."""
    if run.device.type != "cuda":
        raise NotSupported("torch has flash attention on CUDA devices only")
    from a2sf.kernels import prefill

    rng = torch.Generator().manual_seed(7)
    for dtype in (torch.bfloat16, torch.float16):
        for width, slots in FLASH:
            query = torch.randn(1, 8, width, 128, generator=rng).to(run.device, dtype)
            keys, values = (
                torch.randn(1, 2, slots, 128, generator=rng).to(run.device, dtype) for _ in "kv"
            )
            at = torch.arange(slots - width, slots, device=run.device)[None]
            everywhere = torch.arange(slots, device=run.device).int()
            position = everywhere.expand(1, 2, slots).contiguous()
            output, lse = prefill.flash(query, keys, values, 0.1)
            exact = [tensor.double() for tensor in (query, keys, values)]
            want = attend(exact[0], at, exact[1], exact[2], position, 0.1)
            torch.testing.assert_close(output.double(), want, rtol=0, atol=2e-2)
            logits = exact[0] @ exact[1].repeat_interleave(4, dim=1).transpose(2, 3) * 0.1
            hidden = position[:, :1, None, :] > at[:, None, :, None]
            normaliser = logits.masked_fill(hidden, -torch.inf).logsumexp(dim=-1)
            torch.testing.assert_close(lse.double(), normaliser, rtol=1e-3, atol=1e-3)
    return f"{2 * len(FLASH)} shapes, four query heads a KV head"


def engine_kernels(run: Run) -> str:
    """The engine on Triton against the engine on torch's operations, request by request."""
    model = _checked_model(run)
    _needs_kernels(run, model.shape.head_dim)
    made = [
        one
        for one in any_requests(model, run.sizes.requests, seed=2, longest=40, most=16)
        if len(one.prompt_ids) + one.max_new_tokens < ENGINE["slots"]
    ]
    parted = 0
    together = Recorder(engine_for(model, kernels="triton", **ENGINE))
    for one in made:
        together.engine.submit(one)
    while together.engine.has_work:
        run.deadline.check()
        together.step()
    for one in made:
        run.deadline.check()
        alone = Recorder(engine_for(model, kernels="torch", **ENGINE))
        alone.engine.submit(one)
        while alone.engine.has_work:
            alone.step()
        name = one.request_id
        found = parting(alone.steps[name], together.steps[name])
        if found is not None and found.gap > TOLERANCE[model.dtype]:
            raise CheckFailed(f"request {name}: {found}")
        parted += found is not None
    return f"{len(made)} random requests, of which {parted} parted at a near-tie"


def engine_graphs(run: Run) -> str:
    """The engine with its steps captured against the same without graphs."""
    if run.device.type != "cuda":
        raise NotSupported("CUDA graphs need a CUDA device")
    model = _checked_model(run)
    answers = []
    for graphs in (False, True):
        engine = engine_for(model, kernels="triton", cuda_graphs=graphs, **ENGINE)
        for one in any_requests(model, run.sizes.requests, seed=5, longest=30, most=25):
            engine.submit(one)
        answers.append({name: tokens(stream) for name, stream in run_engine(engine).items()})
    if answers[0] != answers[1]:
        other = [name for name in answers[0] if answers[0][name] != answers[1][name]]
        raise CheckFailed(f"other tokens for requests {', '.join(other)}")
    return f"{len(answers[0])} random requests, the same tokens"


def _checked_model(run: Run) -> LoadedModel:
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    # Wider weights than usual, so that attention is peaked and evictions change the tokens.
    return build(CHECKED, run.device, dtype, deviation=0.2)


def _needs_kernels(run: Run, head_dim: int) -> None:
    reason = problem(run.device, torch.float32, head_dim)
    if reason is not None:
        raise NotSupported(f"no Triton kernels: {reason}")
