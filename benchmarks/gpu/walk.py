"""Compares two ways through one layer: all tokens in one launch, or one decode kernel per token.

Both start from empty slots and do the same work, for a whole text of each row. Knows nothing of
prompts, or of the model around the layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots
from a2sf.engine import decoding
from a2sf.engine.decoding import Backend
from a2sf.model.loader import LoadedModel
from benchmarks.gpu.filling import policies
from benchmarks.gpu.run import Run, Texts
from benchmarks.gpu.timing import device_ms, spread


def measure(run: Run) -> None:
    """Time both, size by size; the layer is one of the model of 8 billion weights."""
    model = run.model("8b")
    for texts in run.sizes.texts:
        name = f"{texts.rows} texts of {texts.tokens} tokens, budget {texts.budget}"
        with run.report.entry(name):
            run.deadline.check()
            one, many = both(model, texts)
            found = {
                variant: spread(device_ms(action, run.device, run.sizes.rounds))
                for variant, action in (("one_launch", one), ("a_launch_a_token", many))
            }
            fast, slow = (found[variant]["median"] for variant in found)
            run.report.add(
                name,
                rows=texts.rows,
                tokens=texts.tokens,
                budget=texts.budget,
                kernels=decoding.choose_kernels("auto", model),
                times_faster_in_one_launch=round(slow / fast, 3),
                one_launch_ms=found["one_launch"],
                a_launch_a_token_ms=found["a_launch_a_token"],
                one_launch_us_a_token=round(1e3 * fast / texts.tokens, 3),
                one_launch_s_all_layers=round(fast * model.shape.num_layers / 1e3, 4),
            )
        run.free()


def both(model: LoadedModel, texts: Texts) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return a function that walks random texts in one launch, and one with a launch per token.

    Each returns the attention output [rows, H_q, tokens, D].
    """
    shape, device = model.shape, model.device
    backend = decoding.choose_kernels("auto", model)
    rng = torch.Generator(device).manual_seed(0)

    def vectors(heads: int) -> Tensor:
        size = (texts.rows, texts.tokens, heads, shape.head_dim)
        drawn = torch.randn(size, dtype=model.dtype, device=device, generator=rng)
        return drawn.transpose(1, 2)

    projected = (
        vectors(shape.num_attention_heads),
        vectors(shape.num_kv_heads),
        vectors(shape.num_kv_heads),
    )
    table = policies(model, texts.budget, texts.tokens)["table"]
    lengths = [texts.tokens] * texts.rows
    policy = PolicyTensors.stack([table] * texts.rows, lengths, device).layer(0)
    slots = Slots.empty(
        rows=texts.rows,
        slots=((min(texts.budget, texts.tokens),) * shape.num_kv_heads,),
        head_dim=shape.head_dim,
        dtype=model.dtype,
        device=device,
    )
    scale = shape.head_dim**-0.5
    # [tokens, rows], so that the values of one token are contiguous.
    at = torch.arange(texts.tokens + 1, device=device)[:, None].repeat(1, texts.rows)

    def in_one() -> Tensor:
        output = torch.zeros_like(projected[0])
        decoding.walk_texts(
            backend,
            slots,
            policy,
            projected,
            scale,
            start=at[0],
            end=at[-1],
            output=output,
            recorder=None,
        )
        return output

    def by_token() -> Tensor:
        output = torch.zeros_like(projected[0])
        step = _steps(backend, slots, policy, shape.num_attention_heads, scale)
        for token, start in enumerate(at[:-1]):
            one = slice(token, token + 1)
            query, keys, values = (t[:, :, one] for t in projected)
            output[:, :, one] = step(query, keys, values, start)
        return output

    return in_one, by_token


def _steps(
    backend: Backend, slots: Slots, policy: PolicyTensors, query_heads: int, scale: float
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return a function that runs one token per row through the layer, given its position."""
    if backend != "triton":
        steps = decoding.make_steps(backend, slots, policy)
        return lambda query, keys, values, start: steps(start)(0, query, keys, values, scale)
    from a2sf.cache.kernels.decode import Workspace, decode_attention, plan_slots

    plan = plan_slots(slots, policy, torch.zeros_like(policy.sinks))
    workspace = Workspace.empty(slots, query_heads)
    return lambda query, keys, values, start: decode_attention(
        query,
        keys,
        values,
        slots=slots,
        layer=0,
        policy=policy,
        start=start,
        plan=plan,
        scale=scale,
        workspace=workspace,
    )
