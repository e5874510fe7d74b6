"""Policies side by side: nothing lost with room, figures as defined, and comparisons that hold."""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from a2sf.errors import InvalidArgument, NotFound
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.tablefile import save_table
from tests.tables import make_table
from tests.tuner.conftest import sums, write_rows
from tuner.data import packing
from tuner.data.datasets import load
from tuner.evaluate import EvaluationSettings, evaluate
from tuner.evaluation import statistics
from tuner.evaluation.objective import effective
from tuner.evaluation.policy_specs import parse
from tuner.evaluation.results import Cell, Evaluation, Size

METHODS = "full,window,h2o,tova_per_head,random,a2sf:.5,a2sf:.9:0:0"


class Run(Protocol):
    def __call__(self, **overrides: Any) -> Evaluation: ...


@pytest.fixture
def run(small_data: Path, tiny_model_dir: Path) -> Run:
    """Evaluate the tiny model; a few seconds at most."""

    def make(**overrides: Any) -> Evaluation:
        values: dict[str, Any] = {
            "dataset": "sums",
            "policies": METHODS,
            "sizes": (Size(ratio=0.3),),
            "shots": (None,),
            "examples": 5,
            "length": 128,
            "split": "validation",
            "prefill_chunk": None,
            "seed": 0,
            "data_dir": small_data,
            "model": str(tiny_model_dir),
            "revision": None,
            "device": "cpu",
            "dtype": "float32",
            "command": "",
        }
        return evaluate(EvaluationSettings(**{**values, **overrides}))

    return make


def cells(found: Evaluation) -> dict[str, Cell]:
    return {cell.policy: cell for cell in found.cells}


def test_other_slot_rules_are_compared_with_tables_at_the_same_budget(
    run: Run, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    save_table(make_table(tiny_model.identity), tmp_path / "made-up.json")
    names = ["h2o", "pyramid", "adakv", "adakv:.9:2"]
    found = run(policies=",".join([*names, str(tmp_path / "made-up.json")]))
    assert {cell.budget for cell in found.cells} == {cells(found)["h2o"].budget}
    pairs = {(c.policy, c.baseline) for c in found.comparisons if c.metric == "kl"}
    assert pairs == {("made-up", name) for name in names}
    kl = {name: cells(found)[name].kl.mean for name in names}
    # The same score and protection in three divisions of the slots.
    assert len({round(kl[name], 9) for name in ("h2o", "pyramid", "adakv")}) == 3


def test_adakv_is_refused_for_prompts_read_step_by_step(run: Run) -> None:
    with pytest.raises(InvalidArgument, match="adakv splits the slots once, at its end"):
        run(policies="full,adakv", shots=(0,))


@pytest.mark.parametrize("shots", [None, 0, 1])
def test_without_eviction_every_policy_equals_the_full_cache(
    run: Run, tiny_model: LoadedModel, tmp_path: Path, shots: int | None
) -> None:
    save_table(make_table(tiny_model.identity), tmp_path / "made-up.json")
    found = run(
        policies=f"{METHODS},{tmp_path / 'made-up.json'}",
        sizes=(Size(slots=400),),
        shots=(shots,),
    )
    full = cells(found)["full"]
    assert len(found.cells) == 8
    for cell in found.cells:
        assert np.abs(cell.by_example["kl"]).max() < 1e-6
        np.testing.assert_allclose(cell.by_example["nll"], full.by_example["nll"], atol=1e-5)
        assert set(cell.by_example["top1"]) == {1.0}
        assert cell.by_example["accuracy"] == full.by_example["accuracy"]
        np.testing.assert_allclose(cell.similarity_by_head, 1.0, atol=1e-6)


def test_eviction_costs_and_the_figures_are_the_written_out_ones(
    run: Run, tiny_model: LoadedModel, small_data: Path
) -> None:
    found = run(policies="full,a2sf:.9:0:0")
    cell = cells(found)["a2sf:.9:0:0"]
    part = load("sums", small_data).validation
    items = packing.items(tiny_model, part, count=5, length=128, seed=0)
    (policy,) = parse("a2sf:.9:0:0", tiny_model)
    for index, item in enumerate(items):
        example = item.example
        requested_policy = policy.at(Size(ratio=0.3), prefill_chunk=0, seed=0)
        settled = effective(requested_policy, tiny_model, len(example.token_ids))
        (kept,) = teacher_forcing.predict(tiny_model, [example], [settled], similarity=True)
        (full,) = teacher_forcing.predict(tiny_model, [example], None)
        p, q = (torch.softmax(x.logits.double(), dim=-1) for x in (full, kept))
        targets = [example.token_ids[t + 1] for t in example.counted]
        agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
        right = (q.argmax(-1) == torch.tensor(targets)).tolist()
        exact = [all(right[t] for t in answer) for answer in item.answers]
        want = {
            "kl": (p * (p / q).log()).sum(-1).mean(),
            "nll": -q[range(len(targets)), targets].log().mean(),
            "top1": agree,
            "accuracy": sum(exact) / len(exact),
            "similarity": kept.similarity.mean() if kept.similarity is not None else None,
        }
        for name, value in want.items():
            assert cell.by_example[name][index] == pytest.approx(float(value), rel=1e-3, abs=1e-5)  # type: ignore[index, arg-type]
    assert cell.kl.mean > 0.01
    assert cell.kl == statistics.estimate(cell.by_example["kl"])


def test_the_likeliest_choice_equals_transformers(
    run: Run, tiny_model: LoadedModel, tiny_model_dir: Path, small_data: Path
) -> None:
    found = run(policies="full,window", shots=(1,), sizes=(Size(ratio=0.4),), examples=12)
    (task,) = found.tasks
    assert (task.name, task.accuracy, task.questions) == ("sums, 1-shot", "likeliest choice", 12)
    assert task.prefill_chunk == 1
    source = load("sums", small_data)
    items = packing.items(
        tiny_model,
        source.validation,
        count=12,
        length=128,
        seed=0,
        shots=1,
        solved=source.calibration,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    right = []
    for item in items:
        scores = []
        for alternative in item.alternatives:
            ids = list(alternative.token_ids)
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            # One token a byte: the choice is what follows the last "Answer: ".
            choice = tokenizer.decode(ids).rsplit("Answer: ", 1)[1]
            first = len(ids) - len(choice)
            scores.append(sum(float(log_p[t - 1, ids[t]]) for t in range(first, len(ids))))
        right.append(float(scores.index(max(scores)) == item.right))
    assert cells(found)["full"].by_example["accuracy"] == tuple(right)
    assert 0 < sum(right) < 12


def test_sharing_passes_changes_no_figure(run: Run) -> None:
    together = cells(run(examples=3))
    for name in ("h2o", "random", "a2sf:.5"):
        alone = cells(run(examples=3, policies=name))
        np.testing.assert_allclose(
            together[name].by_example["kl"], alone[name].by_example["kl"], rtol=1e-4, atol=1e-7
        )


def test_sizes_are_kept_apart_and_full_has_none(run: Run) -> None:
    sizes = (Size(ratio=0.2), Size(ratio=0.8), Size(slots=30))
    found = run(policies="full,h2o", sizes=sizes, examples=2)
    assert [(cell.policy, cell.size) for cell in found.cells] == [
        ("full", None),
        *(("h2o", size) for size in sizes),
    ]
    budgets = [cell.budget for cell in found.cells[1:]]
    assert budgets[0] < budgets[2] == 30 < budgets[1]
    for size in sizes:
        assert found.cell("sums, packed", "full", size) == found.cells[0]


def test_comparisons_are_paired_and_corrected_over_their_family(run: Run) -> None:
    found = run(policies="full,window,h2o,random,a2sf:.5,a2sf:.9", examples=8)
    family = [c for c in found.comparisons if c.metric == "kl"]
    assert {(c.policy, c.baseline) for c in family} == {
        (ours, theirs) for ours in ("a2sf:.5", "a2sf:.9") for theirs in ("window", "h2o", "random")
    }
    assert [c.p_holm for c in family] == statistics.holm([c.p for c in family])
    by_policy = cells(found)
    for c in family:
        ours, theirs = (by_policy[name].by_example["kl"] for name in (c.policy, c.baseline))
        assert c.difference.mean == pytest.approx(np.mean(np.subtract(ours, theirs)))
    main_comparisons = found.main_comparisons("sums, packed", Size(ratio=0.3))
    best = min(("a2sf:.5", "a2sf:.9"), key=lambda name: by_policy[name].kl.mean)
    assert {c.policy for c in main_comparisons} == {best}


def test_generated_tasks_and_text_are_evaluated_too(
    run: Run, reference_model: LoadedModel, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of some text\n" for number in range(4000)))
    found = run(
        dataset=f"recall,state,arith,{text}",
        model="reference",
        policies="full,window",
        examples=2,
        length=96,
    )
    kinds = {task.dataset: task.accuracy for task in found.tasks}
    exact = "exact greedy answer"
    assert kinds == {"recall": exact, "state": exact, "arith": exact, "text.txt": None}
    assert {cell.accuracy is None for cell in found.cells if cell.task == "text.txt"} == {True}
    assert found.cell("recall", "full", None).accuracy.mean > 0.5  # type: ignore[union-attr]


def test_the_document_survives_json(run: Run) -> None:
    found = run(examples=2, policies="full,h2o,a2sf:.9")
    assert Evaluation.model_validate_json(found.model_dump_json()) == found
    assert "NaN" not in json.dumps(json.loads(found.model_dump_json()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"examples": 500}, "500 of at most 128 tokens, and validation of sums gives"),
        (
            {"sizes": (Size(slots=5),), "policies": "a2sf:.5:4:4"},
            "--slots: a2sf:.5:4:4 at 5 slots, on sums",
        ),
        ({"dataset": "recall", "length": 24}, "gives 0"),
        ({"shots": (1,), "length": 40}, "validation of sums gives 0"),
        ({"policies": "snapkv"}, "'snapkv'"),
    ],
)
def test_impossible_evaluations_are_refused_before_any_pass(
    run: Run, overrides: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        teacher_forcing, "predictions", lambda *_, **__: pytest.fail("a pass was begun")
    )
    with pytest.raises(InvalidArgument) as caught:
        run(**overrides)
    assert message in str(caught.value)


def test_the_name_of_a_data_file_may_contain_a_comma(run: Run, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "one,two.jsonl", sums(0, 120))
    assert [task.dataset for task in run(dataset=str(path), policies="full").tasks] == [path.name]


def test_a_data_set_that_is_given_twice_is_refused(run: Run) -> None:
    with pytest.raises(InvalidArgument, match="dataset: 'sums' is given twice"):
        run(dataset="sums, sums")


def test_the_line_on_the_data_names_the_measured_part(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run(policies="full", split="calibration")
    (line,) = (one for one in capsys.readouterr().err.splitlines() if one.startswith("Data: "))
    assert line.endswith("(120 rows). Measured on calibration.")
    assert "searched" not in line


def test_rows_with_different_kinds_of_answers_have_no_accuracy(run: Run, tmp_path: Path) -> None:
    free = [{"question": f"and {n} ?", "answer": f"so {n}"} for n in range(40)]
    path = write_rows(
        tmp_path / "mixed.jsonl",
        [row for two in zip(sums(0, 40), free, strict=True) for row in two],
    )
    found = run(dataset=str(path), shots=(0,), policies="full,window")
    assert (found.tasks[0].accuracy, found.tasks[0].questions) == (None, 0)
    assert {cell.accuracy for cell in found.cells} == {None}


def test_solved_examples_come_from_the_other_part(
    run: Run, tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = packing.items

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((args[1].split, kwargs["solved"].split))
        return real(*args, **kwargs)

    monkeypatch.setattr(packing, "items", spy)
    for split in ("validation", "calibration"):
        run(split=split, shots=(1,), policies="full", examples=2)
    assert seen == [("validation", "calibration"), ("calibration", "validation")]


def test_shots_before_running_text_are_refused(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words and words\n" * 2000)
    with pytest.raises(InvalidArgument, match="running text has no questions"):
        run(dataset=str(text), shots=(1,))
    with pytest.raises(NotFound, match="'nothing' not found"):
        run(dataset="nothing")


def test_policies_that_read_prompts_exactly_share_them_and_a_table_of_blocks_does_not(
    run: Run, tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_table(tiny_model.identity, prefill_chunk=7, budget=20, sinks=1, recent=2)
    save_table(blocks, tmp_path / "blocks.json")
    given: list[bool] = []
    honest = teacher_forcing.predict

    def noting(*positional: Any, prompts: Any = None, **named: Any) -> Any:
        given.append(prompts is not None)
        return honest(*positional, prompts=prompts, **named)

    monkeypatch.setattr(teacher_forcing, "predict", noting)
    methods = f"h2o,window,a2sf:.5,{tmp_path / 'blocks.json'}"
    # Rows for one policy at a time.
    monkeypatch.setattr("tuner.evaluation.passes.ROWS_PER_PASS", 5)
    shared = run(policies=methods, sizes=(Size(slots=20),))
    assert given == [True, True, True, False]
    monkeypatch.setattr("tuner.evaluation.objective.PROMPT_BYTES", 0)
    given.clear()
    for mine, plain in zip(
        shared.cells, run(policies=methods, sizes=(Size(slots=20),)).cells, strict=True
    ):
        for name in ("kl", "nll", "similarity"):
            np.testing.assert_allclose(mine.by_example[name], plain.by_example[name], atol=1e-5)
    assert given == [False] * 4
