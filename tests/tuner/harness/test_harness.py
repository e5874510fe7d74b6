"""lm-evaluation-harness over this engine: exact where nothing is evicted, lawful where it is."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import tuner.harness.__main__
from a2sf import reference
from a2sf.errors import A2SFError, InvalidArgument, NonFinite, Unsupported
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.policy import CachePolicy
from a2sf.requests import Delta
from a2sf.tablefile import load_table, save_table
from tests.broken import BROKEN
from tests.driving import engine_for, request, run
from tests.tables import make_table
from tests.tiny import byte_tokenizer, save_poisoned_llama
from tests.tuner.conftest import write_rows
from tuner.data.generated import recall_episode
from tuner.evaluation import policy_specs
from tuner.evaluation.objective import effective, log_likelihoods
from tuner.evaluation.results import Size
from tuner.harness.arguments import Arguments, SequencePolicies
from tuner.harness.model import HarnessModel

ROOT = Path(__file__).resolve().parents[3]

TABLE = reference.path() / "tables" / "mathqa.json"

PAIRS = [
    ("The code of the lamp is 412.\nWhat is the code of the lamp?", " 412"),
    ("The code of the lamp is 412.\nWhat is the code of the lamp?", " 413"),
    ("The cat sat on the mat and looked at", " the dog, which barked. "),
    ("A space stands at the end ", "of this context"),
    ("", "Nothing comes before this sentence."),
]
PROMPTS = [
    "The code of the lamp is 412. The code of the door is 7.\nWhat is the code of the door?",
    "Question: what is",
    "",
]


@pytest.fixture(scope="module")
def plain() -> Any:
    """The packaged model as transformers alone runs it."""
    model = AutoModelForCausalLM.from_pretrained(reference.path(), dtype=torch.float32)
    return model.eval()


def harness_model(**arguments: object) -> HarnessModel:
    return HarnessModel(**{"pretrained": "reference", "device": "cpu", **arguments})


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=index)  # type: ignore[arg-type]
        for index, given in enumerate(arguments)
    ]


def likelihoods(
    model: HarnessModel, pairs: list[tuple[str, str]] = PAIRS
) -> list[tuple[float, bool]]:
    found = model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert isinstance(found, list)
    return found


def generate(model: HarnessModel, prompts: list[str] = PROMPTS, **gen_kwargs: Any) -> list[str]:
    asked: list[tuple[Any, ...]] = [(prompt, gen_kwargs) for prompt in prompts]
    return model.generate_until(instances("generate_until", asked), disable_tqdm=True)


def rolling(model: HarnessModel, *texts: str) -> list[float]:
    asked: list[tuple[Any, ...]] = [(text,) for text in texts]
    return model.loglikelihood_rolling(instances("loglikelihood_rolling", asked), disable_tqdm=True)


def token_pairs(model: HarnessModel) -> list[tuple[list[int], list[int]]]:
    """The pairs as the harness cuts them: a space at the end goes to the continuation."""
    return [
        model._encode_pair(context, continuation)
        if context
        else ([model.prefix_token_id], model.tok_encode(continuation, add_special_tokens=False))
        for context, continuation in PAIRS
    ]


def plain_log_p(plain: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return plain(torch.tensor([ids])).logits[0].log_softmax(dim=-1)


def plain_text(plain: Any, ids: list[int], new: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(reference.path())
    prompt = torch.tensor([ids])
    whole = plain.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


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
def test_log_likelihoods_under_eviction_are_the_teachers_own(
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


def test_a_whole_text_is_what_follows_the_first_token() -> None:
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


def test_what_is_too_long_loses_its_beginning_with_one_warning(
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


def test_full_generation_is_that_of_transformers(plain: Any) -> None:
    model = harness_model(batch_size=2)
    expected = [plain_text(plain, model.tok_encode(prompt), 20) for prompt in PROMPTS]
    assert generate(model, max_gen_toks=20) == expected
    assert generate(model, max_new_tokens=20, do_sample=False, temperature=0.7) == expected


@pytest.mark.parametrize(
    ("policy", "wish"),
    [
        ("a2sf:.9:.5:1", CachePolicy(alpha=0.9, recent_share=0.5, sinks=1, prefill_chunk=3)),
        ("mathqa", CachePolicy(table="mathqa", prefill_chunk=3)),
    ],
)
def test_generation_under_eviction_is_the_engines_own(policy: str, wish: CachePolicy) -> None:
    model = harness_model(policy=policy, ratio=0.4, prefill_chunk=3, batch_size=2)
    engine = engine_for(model.model)
    for index, prompt in enumerate(PROMPTS):
        ids = model.tok_encode(prompt)
        given = {
            "cache_policy": wish.model_copy(update={"budget": int(0.4 * (len(ids) + 20) + 0.5)}),
            "table": load_table(TABLE) if wish.table else None,
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


def test_a_ratio_of_a_table_is_that_very_ratio_whatever_the_table_s_floor(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    ratio = {"budget": None, "budget_ratio": 0.2, "min_budget": 64}
    save_table(make_table(tiny_model.identity, **ratio), tmp_path / "floor.json")
    given = {"pretrained": "tiny", "policy": str(tmp_path / "floor.json")}
    assert SequencePolicies(Arguments.read(given), tiny_model).at(100).budget == 20
    asked = SequencePolicies(Arguments.read({**given, "ratio": 0.3}), tiny_model)
    assert asked.at(100).budget == 30


def test_a_context_of_spaces_alone_is_an_empty_one(tiny_model_dir: Path) -> None:
    model = harness_model(pretrained=str(tiny_model_dir))
    blank, empty = likelihoods(model, [("  ", "word"), ("", "  word")])
    assert blank == empty


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
def test_what_the_engine_cannot_do_is_refused_by_name(
    gen_kwargs: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        generate(harness_model(), **gen_kwargs)


def test_other_engines_arguments_are_accepted_where_they_ask_for_nothing() -> None:
    assert generate(harness_model(), ["a"], max_gen_toks=2, num_beams=1, repetition_penalty=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefil_chunk": 1}, r"prefil_chunk: unknown; accepted: pretrained, .*prefill_chunk"),
        ({"pretrained": None}, r"pretrained: None; .*string"),
        ({"pretrained": "no such model"}, r"no such directory"),
        ({"policy": "h3o", "ratio": 0.5}, r"policy: 'h3o'; accepted: full; window"),
        ({"policy": "h2o,window", "ratio": 0.5}, r"policy: .* is 2 policies; accepted: one"),
        ({"policy": "a2sf", "ratio": 0.5}, r"policy: 'a2sf' is \d+ policies; accepted: one"),
        ({"policy": "adakv", "ratio": 0.5}, r"policy: 'adakv' deals slots as no server does"),
        ({"policy": "pyramid", "ratio": 0.5}, r"policy: 'pyramid' deals .* tuner evaluate"),
        ({"policy": "h2o"}, r"ratio: policy h2o takes one of ratio and slots; got 0"),
        ({"policy": "h2o", "ratio": 0.5, "slots": 9}, r"takes one of ratio and slots; got 2"),
        ({"slots": 9}, r"policy: full keeps every token; leave ratio and slots out"),
        ({"policy": "h2o", "ratio": "1.5"}, r"ratio: '1.5'; .*less than or equal to 1"),
        ({"batch_size": "many"}, r"batch_size: 'many'; .*integer"),
        ({"max_length": 4096}, r"max_length: 4096; accepted: up to 1024"),
        ({"device": "tpu"}, r"device: 'tpu'; accepted: auto, cpu"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_accepted(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(A2SFError, match=message):
        harness_model(**arguments)


def test_a_sequence_too_short_for_its_policy_is_told_with_its_length() -> None:
    model = harness_model(policy="a2sf:.9", ratio=0.2)
    with pytest.raises(InvalidArgument, match=r"a sequence has \d tokens; budget is \d tokens"):
        likelihoods(model, [("a", " b c")])


def test_own_arguments_win_over_the_harness_flags() -> None:
    flags = {"batch_size": "auto", "max_batch_size": None, "device": "cuda:0"}
    made = HarnessModel.create_from_arg_string("pretrained=reference,policy=h2o,ratio=.2", flags)
    assert made.batch_size == 32
    assert made.policies.wish.budget_ratio == 0.2
    own = HarnessModel.create_from_arg_obj(
        {"pretrained": "reference", "batch_size": 3, "device": "cpu"}, flags
    )
    assert own.batch_size == 3


def test_a_chat_template_is_the_tokenizers_or_refused(tiny_model_dir: Path) -> None:
    model = harness_model(pretrained=str(tiny_model_dir))
    said = [{"role": "user", "content": "hello"}]
    with pytest.raises(Unsupported, match="no chat template"):
        model.apply_chat_template(said)
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert model.apply_chat_template(said) == "<hello>"


def test_no_requests_have_no_answers() -> None:
    model = harness_model()
    assert (likelihoods(model, []), rolling(model), generate(model, [])) == ([], [], [])


def write_task(directory: Path, name: str, rows: Path, **settings: Any) -> None:
    """A task of the harness over one file of rows, its cache beside it."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(rows)},
            "cache_dir": str(directory / "cache"),
        },
        "validation_split": "validation",
        **settings,
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@pytest.fixture
def science(data_dir: Path, tmp_path: Path) -> Path:
    """A directory with the task `science`: multiple choice over OpenBookQA."""
    write_task(
        tmp_path,
        "science",
        data_dir / "openbookqa" / "validation.jsonl",
        output_type="multiple_choice",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    return tmp_path


def evaluate(directory: Path, task: str, limit: int, **arguments: object) -> dict[str, Any]:
    tuner.harness.__main__.register()
    results = simple_evaluate(
        model="a2sf",
        model_args={"pretrained": "reference", **arguments},
        tasks=[task],
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        batch_size="auto",
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
    )
    assert results is not None
    return dict(results)


def test_a_multiple_choice_task_is_scored_as_transformers_would(
    science: Path, data_dir: Path, plain: Any
) -> None:
    results = evaluate(science, "science", 8)
    model = harness_model()
    lines = (data_dir / "openbookqa" / "validation.jsonl").read_text(encoding="utf-8").split("\n")
    right = 0
    for row in map(json.loads, lines[:8]):
        context = model.tok_encode(f"Question: {row['question']}\nAnswer:")
        scores = []
        for choice in row["choices"]:
            ids = model.tok_encode(f"Question: {row['question']}\nAnswer: {choice}")
            log_p = plain_log_p(plain, ids[:-1])
            answer = range(len(context) - 1, len(ids) - 1)
            scores.append(sum(float(log_p[at, ids[at + 1]]) for at in answer))
        right += scores.index(max(scores)) == row["answer"]
    assert results["results"]["science"]["acc,none"] == right / 8
    assert results["config"]["a2sf"]["policy"] == {"preset": "full", "prefill_chunk": 0}


def test_a_generation_task_is_scored(tmp_path: Path) -> None:
    rng = Random(0)
    rows = []
    for _ in range(8):
        episode = recall_episode(rng, split="validation", facts=3, form="sentence")
        ((question, answer),) = episode.turns
        rows.append({"prompt": episode.context + question, "answer": answer.strip()})
    write_task(
        tmp_path,
        "recall",
        write_rows(tmp_path / "recall.jsonl", rows),
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n", "."], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[
            {
                "name": "strip",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(\d+)"},
                    {"function": "take_first"},
                ],
            }
        ],
    )
    full = evaluate(tmp_path, "recall", 8)
    forgetful = evaluate(tmp_path, "recall", 8, policy="window:0", slots=8, prefill_chunk=1)
    assert full["results"]["recall"]["exact_match,strip"] > 0.8
    assert forgetful["results"]["recall"]["exact_match,strip"] < 0.5


@pytest.mark.slow
def test_the_command_line_is_the_harness_own(science: Path) -> None:
    arguments = [
        *("--model", "a2sf", "--tasks", "science", "--include_path", science, "--limit", "4"),
        *("--model_args", "pretrained=reference,policy=a2sf:.9:.5,ratio=0.5,prefill_chunk=1"),
        *("--output_path", science / "out"),
    ]
    environment = {
        **os.environ,
        **{"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(science / "home")},
    }
    done = subprocess.run(
        [sys.executable, "-m", "tuner.harness", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (science / "out").rglob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["n-samples"]["science"]["effective"] == 4
    assert 0 <= results["results"]["science"]["acc,none"] <= 1
    assert results["config"]["a2sf"]["policy"]["alpha"] == 0.9


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(SystemExit) as caught:
        tuner.harness.__main__.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert "pip install 'a2sf-serve[eval]'" in line


def test_a_refusal_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise InvalidArgument("ratio", "wrong\nindeed")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(SystemExit) as caught:
        tuner.harness.__main__.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: ratio: wrong indeed\n"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["quantised by gptq", "an unknown activation"])
def test_a_broken_checkpoint_is_told_by_the_harness_too(
    name: str, science: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_model_dir, tmp_path / "checkpoint"))
    BROKEN[name].change(checkpoint)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tuner.harness", "--model", "a2sf"),
            *("--tasks", "science", "--include_path", str(science)),
            *("--model_args", f"pretrained={checkpoint},policy=h2o,ratio=0.5"),
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert BROKEN[name].told in last


class Cache:
    """What the harness's own cache is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
        self.told.append((arguments[0], answer))


def test_requests_that_are_not_finite_are_an_error_after_all_others_are_answered(
    tmp_path: Path,
) -> None:
    # The token of the byte z.
    (poison,) = byte_tokenizer().encode("z", add_special_tokens=False)
    save_poisoned_llama(tmp_path, poison)
    model = harness_model(pretrained=str(tmp_path), batch_size=2, max_length=64)
    prompts = ["good", "a z", "as good"]

    def ask_likelihoods() -> object:
        return likelihoods(model, [(prompt, " x") for prompt in prompts])

    def ask_texts() -> object:
        return generate(model, prompts, until=[], max_gen_toks=4)

    for ask in (ask_likelihoods, ask_texts):
        cache = model.cache_hook = Cache()
        with pytest.raises(NonFinite, match="1 of 3 requests failed, the first as number 2: "):
            ask()
        assert [name for name, _ in sorted(cache.told)] == ["as good", "good"]
