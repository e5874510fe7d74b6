"""Log-likelihoods: those of transformers with a full cache, of teacher forcing with eviction."""

import logging
from pathlib import Path
from typing import Any

import pytest

from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from tests.tuner.harness.asking import (
    PAIRS,
    PROMPTS,
    generate,
    harness_model,
    likelihoods,
    plain_log_p,
    plain_text,
    rolling,
    token_pairs,
)
from tuner.evaluation import policy_specs
from tuner.evaluation.divergence import log_likelihoods
from tuner.evaluation.objective import effective
from tuner.evaluation.results import Size


def test_full_log_likelihoods_are_those_of_transformers(plain: Any) -> None:
    model = harness_model()
    expected = []
    for context, continuation in token_pairs(model):
        log_p = plain_log_p(plain, context + continuation)[len(context) - 1 : -1]
        own = log_p[range(len(continuation)), continuation]
        greedy = log_p.argmax(dim=-1).tolist() == continuation
        expected.append((float(own.sum()), greedy))
    found = likelihoods(model)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}


@pytest.mark.parametrize(
    ("policy", "size", "prefill_chunk"),
    [
        ("a2sf:.9:.5:1", Size(ratio=0.4), None),
        ("a2sf:.9:.5:1", Size(ratio=0.4), 1),
        ("h2o:1", Size(slots=4), 3),
        ("random:1:1", Size(slots=5), 2),
        ("mathqa", Size(slots=9), None),
        ("mathqa", Size(ratio=0.9), None),
    ],
)
def test_log_likelihoods_with_eviction_equal_teacher_forcing(
    policy: str, size: Size, prefill_chunk: int | None
) -> None:
    given = {k: v for k, v in size.model_dump().items() if v is not None}
    if prefill_chunk is not None:
        given["prefill_chunk"] = prefill_chunk
    model = harness_model(policy=policy, seed=3, **given)
    (named,) = policy_specs.parse(policy, model.model)
    candidate = named.at(size, prefill_chunk=prefill_chunk or 0, seed=3)
    full = likelihoods(harness_model())
    found = likelihoods(model)
    for (context, continuation), (value, _) in zip(token_pairs(model), found, strict=True):
        ids = (*context, *continuation)
        example = Example(ids, len(context), tuple(range(len(context) - 1, len(ids) - 1)))
        rule = effective(candidate, model.model, len(ids))
        (prediction,) = teacher_forcing.predict(model.model, [example], [rule])
        expected = log_likelihoods(example, prediction.logits.log_softmax(dim=-1)).sum()
        assert value == pytest.approx(float(expected), abs=1e-4)
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, full, strict=True)) > 1e-3


def test_the_batch_size_changes_no_result() -> None:
    arguments = {"policy": "a2sf:.9:.5:1", "ratio": 0.4, "prefill_chunk": 4}
    one, two, automatic = (harness_model(batch_size=size, **arguments) for size in (1, "2", "auto"))
    assert automatic.batch_size == 32
    values = [value for value, _ in likelihoods(one)]
    texts = generate(one, max_gen_toks=12)
    for model in (two, automatic):
        assert [value for value, _ in likelihoods(model)] == pytest.approx(values, abs=1e-4)
        assert generate(model, max_gen_toks=12) == texts


def test_choices_that_differ_in_the_last_token_share_a_prediction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Example] = []
    predict = teacher_forcing.predict

    def spy(model: LoadedModel, examples: list[Example], *rest: Any, **named: Any) -> Any:
        seen.extend(examples)
        return predict(model, examples, *rest, **named)

    monkeypatch.setattr(teacher_forcing, "predict", spy)
    found = likelihoods(harness_model(policy="h2o", slots=8), PAIRS[:2])
    assert len(seen) == 1
    assert found[0] != found[1]


def test_a_rolling_likelihood_predicts_every_token_of_the_text() -> None:
    model = harness_model(policy="a2sf:.9:.5:1", ratio=0.4)
    texts = [continuation for _, continuation in PAIRS[2:]]
    expected = [value for value, _ in likelihoods(model, [("", text) for text in texts])]
    assert rolling(model, *texts) == pytest.approx(expected, abs=1e-4)


def test_a_text_longer_than_max_length_is_rolled_over(plain: Any) -> None:
    model = harness_model(max_length=16)
    text = " ".join(PROMPTS * 2)
    ids = model.tok_encode(text, add_special_tokens=False)
    assert len(ids) % 16
    assert len(ids) > 32
    expected = 0.0
    for first in range(0, len(ids), 16):
        block = ids[first : first + 16]
        end = first + len(block)
        # The last block has as much before it as fits.
        before = ids[end - 17 : end - 1] if first else [model.prefix_token_id, *block[:-1]]
        log_p = plain_log_p(plain, before)[-len(block) :]
        expected += float(log_p[range(len(block)), block].sum())
    assert rolling(model, text, text) == pytest.approx([expected] * 2, abs=1e-3)


def test_long_sequences_lose_their_beginning_with_one_warning(
    plain: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = harness_model(max_length=16)
    context, continuation = PAIRS[0][0] * 3, PAIRS[0][1]
    whole = model.tok_encode(context + continuation)
    answer = whole[len(model.tok_encode(context)) :]
    with caplog.at_level(logging.WARNING, logger="tuner"):
        ((value, _),) = likelihoods(model, [(context, continuation)])
        (text,) = generate(model, [context], max_gen_toks=4)
    (record,) = caplog.records
    assert "max_length 16" in record.getMessage()
    log_p = plain_log_p(plain, whole[-17:-1])[-len(answer) :]
    assert value == pytest.approx(float(log_p[range(len(answer)), answer].sum()), abs=1e-4)
    assert text == plain_text(plain, model.tok_encode(context)[-12:], 4)


def test_a_continuation_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"continuation: \d+ tokens; accepted: 1 to"):
        likelihoods(harness_model(max_length=16), [("a", " b" * 20)])


def test_a_context_of_spaces_alone_is_an_empty_one(tiny_model_dir: Path) -> None:
    model = harness_model(pretrained=str(tiny_model_dir))
    blank, empty = likelihoods(model, [("  ", "word"), ("", "  word")])
    assert blank == empty
