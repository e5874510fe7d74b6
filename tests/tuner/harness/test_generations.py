"""Generation: equal to transformers with a full cache, and to the serving engine with eviction."""

from pathlib import Path
from typing import Any

import pytest

from a2sf.errors import InvalidArgument
from a2sf.policy import CachePolicy
from a2sf.requests import Delta
from a2sf.tablefile import load_table
from tests.driving import engine_for, request, run
from tests.tuner.harness.asking import PROMPTS, TABLE, generate, harness_model, plain_text


def test_full_generation_equals_transformers(plain: Any) -> None:
    model = harness_model(batch_size=2)
    expected = [plain_text(plain, model.tok_encode(prompt), 20) for prompt in PROMPTS]
    assert generate(model, max_gen_toks=20) == expected
    assert generate(model, max_new_tokens=20, do_sample=False, temperature=0.7) == expected


@pytest.mark.parametrize(
    ("policy", "requested_policy"),
    [
        ("a2sf:.9:.5:1", CachePolicy(alpha=0.9, recent_share=0.5, sinks=1, prefill_chunk=3)),
        ("mathqa", CachePolicy(table="mathqa", prefill_chunk=3)),
    ],
)
def test_generation_with_eviction_equals_the_engine(
    policy: str, requested_policy: CachePolicy
) -> None:
    model = harness_model(policy=policy, ratio=0.4, prefill_chunk=3, batch_size=2)
    engine = engine_for(model.model)
    for index, prompt in enumerate(PROMPTS):
        ids = model.tok_encode(prompt)
        given = {
            "cache_policy": requested_policy.model_copy(
                update={"budget": int(0.4 * (len(ids) + 20) + 0.5)}
            ),
            "table": load_table(TABLE) if requested_policy.table else None,
            "ignore_eos": False,
        }
        engine.submit(request(str(index), ids, max_new_tokens=20, **given))
    streams = run(engine)
    expected = [
        "".join(event.text for event in streams[str(index)] if isinstance(event, Delta))
        for index in range(len(PROMPTS))
    ]
    assert generate(model, max_gen_toks=20) == expected
    assert generate(harness_model(), max_gen_toks=20) != expected


def test_stop_strings_are_cut_off() -> None:
    model = harness_model(policy="h2o", slots=12)
    (text,) = generate(model, PROMPTS[:1], max_gen_toks=20)
    stop = text[3:5]
    (cut,) = generate(model, PROMPTS[:1], max_gen_toks=20, until=["never", stop, ""])
    assert cut == text[: text.index(stop)]


def test_a_special_token_among_the_stop_strings_stops(tiny_model_dir: Path) -> None:
    model = harness_model(pretrained=str(tiny_model_dir), batch_size="auto")
    wild = {"do_sample": True, "temperature": 100.0, "max_gen_toks": 60}
    on = generate(model, ["x"] * 20, **wild)
    stopped = generate(model, ["x"] * 20, until="<bos>", **wild)
    assert len(set(on)) == 20
    assert all(
        whole.startswith(part.rstrip("\ufffd")) for whole, part in zip(on, stopped, strict=True)
    )
    assert on != stopped


@pytest.mark.parametrize(
    ("gen_kwargs", "named"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"typical_p": 0.5}, "typical_p=0.5"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 2.0}, "top_p"),
        ({"max_gen_toks": 4096}, "max_gen_toks"),
        ({"until": [str(number) for number in range(20)]}, "stop"),
    ],
)
def test_unsupported_generation_arguments_are_refused_by_name(
    gen_kwargs: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        generate(harness_model(), **gen_kwargs)


def test_arguments_of_other_engines_are_accepted_at_neutral_values() -> None:
    assert generate(harness_model(), ["a"], max_gen_toks=2, num_beams=1, repetition_penalty=1.0)
