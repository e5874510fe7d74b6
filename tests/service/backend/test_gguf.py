"""GGUF files in the fit, the server, the plan and the evaluation."""

import json
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

import tuner.search.uniform
from a2sf.errors import TableMismatch
from a2sf.model.loader import load_model
from a2sf.policy import CachePolicy
from a2sf.requests import ChatMessage
from a2sf.tablefile import load_table
from tests.gguf_files import save_checkpoint, save_gguf
from tests.service.conftest import StartServer
from tests.service.planning import planned, refused
from tests.tuner.conftest import sums, write_rows
from tuner.__main__ import main as tuner_main


def tune(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the tuner's command line; it must succeed."""
    monkeypatch.setattr(sys, "argv", ["a2sf-tune", *map(str, arguments)])
    # main() sets it for its own process; here it would outlive the test.
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    # Six uniform settings in the place of 88.
    monkeypatch.setattr(tuner.search.uniform, "GRID", tuner.search.uniform.GRID[::15])
    with pytest.raises(SystemExit) as ended:
        tuner_main()
    assert ended.value.code == 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "sums").mkdir(parents=True)
    write_rows(tmp_path / "data" / "sums" / "calibration.jsonl", sums(0, 40))
    write_rows(tmp_path / "data" / "sums" / "validation.jsonl", sums(40, 90))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("family", "kind"), [(LlamaConfig, "F16"), (Qwen2Config, "Q8_0")], ids=["llama", "qwen2"]
)
async def test_a_table_fitted_on_a_gguf_file_is_served_only_for_that_file(
    family: type[PreTrainedConfig],
    kind: str,
    start_server: StartServer,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family)
    path = save_gguf(checkpoint, tmp_path / f"tiny-{kind}.gguf", kind=GGMLQuantizationType[kind])
    out = tmp_path / "tables" / "sums.json"
    out.parent.mkdir()
    common = ("--data-dir", data, "--model", path, "--device", "cpu", "--length", 128)
    tune(
        monkeypatch,
        *("--dataset", "sums", *common, "--trials", 2, "--examples", 2, "--holdout", 4),
        *("--stages", "heads", "--keep-table", "--out", out),
    )
    assert load_table(out).model.id == f"tiny-{kind}"

    _, client, _ = await start_server(model=str(path), tables=out.parent)
    listing = await client.list_alpha_tables()
    assert list(listing.served) == ["sums"]
    served = await client.get_model()
    assert (served.model.id, served.chat) == (f"tiny-{kind}", True)
    answer = await client.generate(
        [ChatMessage(role="user", content="what is 12 ?")],
        max_new_tokens=30,
        ignore_eos=True,
        cache_policy=CachePolicy(table="sums", budget=16),
    )
    assert answer.finished.usage.completion_tokens == 30
    assert answer.finished.cache.evicted_tokens > 0

    other = save_gguf(checkpoint, tmp_path / "tiny-Q4_0.gguf", kind=GGMLQuantizationType.Q4_0)
    with pytest.raises(TableMismatch, match="the weights differ"):
        load_table(out, load_model(str(other), device="cpu").identity)
    _, client, _ = await start_server(model=str(other), tables=out.parent)
    assert "the weights differ" in (await client.list_alpha_tables()).refused["sums"]

    figures = tmp_path / "figures.json"
    tune(
        monkeypatch,
        *("evaluate", "--dataset", "sums", *common, "--policies", f"h2o,{out}"),
        *("--ratios", ".5", "--examples", 2, "--json", figures, "--split", "calibration"),
    )
    assert json.loads(figures.read_text())["model"]["id"] == f"tiny-{kind}"


def test_a_plan_of_a_gguf_file_equals_the_plan_of_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    path = save_gguf(checkpoint, tmp_path / "tiny.gguf", kind=GGMLQuantizationType.Q8_0)
    sizes = ("--budget", 48, "--max-batch", 2, "--dtype", "float32")
    plan, wanted = planned("--model", path, *sizes), planned("--model", checkpoint, *sizes)
    assert plan["memory"] == wanted["memory"]
    assert plan["weights"] == wanted["weights"]
    assert plan["weights"]["stored_parameters"] == plan["weights"]["parameters"]
    assert str(path) in plan["command"]
    part = tmp_path / "tiny-00001-of-00002.gguf"
    part.write_bytes(path.read_bytes())
    assert "is one of 2 parts" in refused("--model", part, *sizes)


def test_the_harness_accepts_a_gguf_file(tmp_path: Path) -> None:
    from tuner.harness.model import HarnessModel

    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    path = save_gguf(checkpoint, tmp_path / "tiny.gguf")
    model = HarnessModel(pretrained=str(path), device="cpu")
    assert model.model.identity.id == "tiny.F32"
