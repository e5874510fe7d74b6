"""With room for all tokens the engine equals transformers; with evictions, the definitions."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from a2sf import reference
from a2sf.engine import admission
from a2sf.engine.config import EngineConfig
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.policy import CachePolicy
from a2sf.requests import Started
from tests.driving import engine_for, finished, prompts, request, run, tokens
from tests.masked_llama import MaskedLlama
from tests.tables import make_table
from tests.tiny import EOS


@pytest.mark.parametrize(
    "policy",
    [
        CachePolicy(preset="full"),
        CachePolicy(preset="h2o", budget=100),
        CachePolicy(preset="window", budget=100),
        CachePolicy(alpha=0.5, budget=100, prefill_chunk=7),
        CachePolicy(preset="random", budget=100, prefill_chunk=1),
        CachePolicy(table="made-up", budget=100),
        CachePolicy(table="made-up", budget=90, prefill_chunk=8),
    ],
    ids=lambda p: f"{p.preset}-{p.alpha}-{p.prefill_chunk}",
)
def test_with_room_for_all_tokens_it_equals_transformers(
    tiny_model: LoadedModel, tiny_model_dir: Any, policy: CachePolicy
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    engine = engine_for(tiny_model)
    texts = prompts(5)
    table = make_table(tiny_model.identity, head_share=SHARES) if policy.table else None
    for index, prompt in enumerate(texts):
        engine.submit(request(str(index), prompt, cache_policy=policy, table=table))
    streams = run(engine)
    for index, prompt in enumerate(texts):
        want = plain.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=None,
            eos_token_id=EOS + 1,
        )[0, len(prompt) :]
        assert tokens(streams[str(index)]) == want.tolist()
        assert finished(streams[str(index)]).cache.evicted_tokens == 0


@pytest.mark.parametrize("preset", ["full", "window", "h2o", "tova_per_head", "random"])
def test_teacher_forcing_with_room_equals_transformers_logits(
    tiny_model: LoadedModel, tiny_model_dir: Any, preset: Any
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    texts = prompts(4, low=10)
    examples = [
        teacher_forcing.Example(tuple(t), prompt_tokens=len(t) // 2, counted=tuple(range(len(t))))
        for t in texts
    ]
    requested_policy = CachePolicy(preset=preset, budget=None if preset == "full" else 80)
    policies = [
        admission.check(
            request("r", t, cache_policy=requested_policy), tiny_model, EngineConfig(slots=512)
        )
        for t in texts
    ]
    for predicted in (
        teacher_forcing.predict(tiny_model, examples, policies),
        teacher_forcing.predict(tiny_model, examples, None),
    ):
        for text, mine in zip(texts, predicted, strict=True):
            with torch.no_grad():
                want = plain(torch.tensor([text])).logits[0]
            torch.testing.assert_close(mine.logits, want, rtol=1e-4, atol=1e-4)


SHARES = ((0.8, 1.7), (1.0, 0.7), (2.5, 1.0))
"""One number per layer and head of the tiny models."""


def simulate_and_compare(
    model: LoadedModel, directory: Any, prompt: list[int], steps: int, **policy: Any
) -> int:
    """Compare with the masking simulation; return the number of tokens without a near-tie.

    `directory` is the model's directory, or a simulation made from it.
    """
    table = make_table(model.identity, **policy)
    engine = engine_for(model)
    requested_policy = CachePolicy(table=table.name)
    engine.submit(
        request("r", prompt, max_new_tokens=steps, cache_policy=requested_policy, table=table)
    )
    stream = run(engine)["r"]
    assert isinstance(stream[0], Started)
    budgets = stream[0].policy.head_budgets
    cache = finished(stream).cache
    assert (cache.evicted_tokens > 0) == (min(map(min, budgets)) < len(prompt) + steps)
    witness = directory if isinstance(directory, MaskedLlama) else MaskedLlama(directory)
    simulated = witness.decode(
        prompt,
        steps,
        alpha=[list(row) for row in table.policy.alpha],
        budgets=[list(row) for row in budgets],
        recents=[list(row) for row in stream[0].policy.head_recents],
        sinks=table.policy.sinks,
        chunk=table.policy.prefill_chunk,
    )
    for index, (mine, (theirs, gap)) in enumerate(zip(tokens(stream), simulated, strict=True)):
        if gap <= 1e-5:
            return index  # a near-tie may go either way, and so may all later tokens
        assert mine == theirs, f"token {index} differs at a gap of {gap:.2g}"
    return steps


@pytest.mark.parametrize("prefill_chunk", [0, 1, 8])
@pytest.mark.parametrize(
    "shares",
    [
        ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0)),
        ((3.0, 3.0), (1.0, 1.0), (2.0, 2.0)),
        ((2.6, 0.7), (1.0, 1.2), (0.8, 1.9)),
    ],
    ids=["equal", "by layer", "by head"],
)
def test_a_completion_longer_than_the_budget_matches_a_masking_simulation(
    tiny_model: LoadedModel,
    tiny_model_dir: Any,
    prefill_chunk: int,
    shares: tuple[tuple[float, ...], ...],
) -> None:
    clear = 0
    for index, prompt in enumerate(prompts(3, low=20, high=40, seed=prefill_chunk)):
        clear += simulate_and_compare(
            tiny_model,
            tiny_model_dir,
            prompt,
            steps=40,
            alpha=tuple(
                tuple(random.Random(index).choices([0.0, 0.5, 0.9, 0.99, 1.0], k=2))
                for _ in range(3)
            ),
            head_share=shares,
            budget=16,
            recent=3,
            prefill_chunk=prefill_chunk,
        )
    assert clear >= 100, "too few tokens were compared"


@pytest.mark.slow
def test_the_reference_model_matches_a_masking_simulation(reference_model: LoadedModel) -> None:
    prompt = list(reference_model.encode("Once upon a time there was a little dog named 12."))
    clear = simulate_and_compare(
        reference_model, reference.path(), prompt, steps=80, budget=24, recent=6
    )
    assert clear >= 60


def test_the_engine_equals_teacher_forcing(tiny_model_64: LoadedModel) -> None:
    table = make_table(tiny_model_64.identity, prefill_chunk=5, head_share=SHARES)
    for index, requested_policy in enumerate(
        [
            CachePolicy(table=table.name),
            CachePolicy(table=table.name, budget=40, recent_share=0.4, prefill_chunk=0),
            CachePolicy(table=table.name, budget_ratio=0.4, prefill_chunk=1),
            CachePolicy(preset="h2o", budget=20),
            CachePolicy(preset="random", budget=20, recent=2, prefill_chunk=3),
            CachePolicy(preset="tova_per_head", budget_ratio=0.3),
        ]
    ):
        prompt = prompts(1, low=30, high=50, seed=index)[0]
        engine = engine_for(tiny_model_64)
        made = request(
            "r",
            prompt,
            cache_policy=requested_policy,
            table=table if requested_policy.table else None,
            max_new_tokens=30,
        )
        engine.submit(made)
        stream = run(engine)["r"]
        assert isinstance(stream[0], Started)
        answer = tokens(stream)
        example = teacher_forcing.Example(
            token_ids=(*prompt, *answer),
            prompt_tokens=len(prompt),
            counted=tuple(range(len(prompt) - 1, len(prompt) + len(answer) - 1)),
        )
        (predicted,) = teacher_forcing.predict(tiny_model_64, [example], [stream[0].policy])
        assert predicted.logits.argmax(dim=-1).tolist() == answer


@pytest.mark.parametrize("prefill_chunk", [0, 1, 3, 16])
def test_texts_of_different_lengths_predict_the_same_together_and_alone(
    tiny_model_64: LoadedModel, prefill_chunk: int
) -> None:
    rng = random.Random(prefill_chunk)
    table = make_table(tiny_model_64.identity, head_share=SHARES)
    examples, policies = [], []
    for index, text in enumerate(prompts(7, low=12, high=90, seed=prefill_chunk)):
        prompt = rng.randint(1, len(text))
        examples.append(
            teacher_forcing.Example(tuple(text), prompt, counted=tuple(range(0, len(text), 2)))
        )
        requested_policy = rng.choice(
            [
                CachePolicy(alpha=0.9, budget=rng.randint(8, 40), recent=3),
                CachePolicy(preset="h2o", budget_ratio=0.6),
                CachePolicy(preset="random", budget=9, random_seed=index),
                CachePolicy(table=table.name, budget=rng.randint(20, 40), recent_share=0.3),
            ]
        ).model_copy(update={"prefill_chunk": prefill_chunk})
        policies.append(
            admission.check(
                request(
                    "r",
                    text,
                    cache_policy=requested_policy,
                    table=table if requested_policy.table is not None else None,
                ),
                tiny_model_64,
                EngineConfig(slots=512),
            )
        )
    together = teacher_forcing.predict(tiny_model_64, examples, policies, batch=4)
    for example, policy, predicted in zip(examples, policies, together, strict=True):
        (alone,) = teacher_forcing.predict(tiny_model_64, [example], [policy])
        torch.testing.assert_close(predicted.logits, alone.logits)
