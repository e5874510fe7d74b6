"""The harness's tasks and its command line, with this engine as the model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import tuner.harness.__main__
from a2sf.errors import InvalidArgument
from tests.broken import BROKEN
from tests.tuner.conftest import write_rows
from tests.tuner.harness.asking import harness_model, plain_log_p
from tuner.data.generated import recall_episode

ROOT = Path(__file__).resolve().parents[3]


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
def test_the_command_line_is_that_of_the_harness(science: Path) -> None:
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


def test_without_the_extra_the_error_names_the_package_to_install(
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
def test_the_harness_reports_a_broken_checkpoint_in_one_line(
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
    assert BROKEN[name].message in last
