"""What the page on Kubernetes says can be done, and its names and figures are the manifests'."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.validate_manifests import KUBECTL, MANIFESTS, NEWEST, OLDEST, kustomizations
from service.telemetry.metrics import Metrics
from tests.docker.kubernetes import overlay_of, settled
from tests.docker.test_dashboard import NAME, Catalog, Load
from tests.docker.test_kubernetes import KEYS
from tests.docker.test_kubernetes_tuner import CONNECTION

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")

NOBODY = "http://127.0.0.1:1"
"""A cluster that does not answer."""


def commands() -> list[list[str]]:
    """Every kubectl of the page, as words, without what its output goes to."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    parts = [part for line in lines for part in re.split(r" \| | > | &$|^pod=\$\(|\)$", line)]
    return [shlex.split(part)[1:] for part in parts if part.startswith("kubectl ")]


def kubectl(words: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KUBECTL, *words],
        cwd=directory,
        env={**os.environ, "KUBECONFIG": str(directory / "config")},
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )


def made(words: list[str], directory: Path) -> dict[str, Any]:
    """What a `kubectl create` would make, of files that hold their names."""
    for word in words:
        if word.startswith("--from-file="):
            name = word.removeprefix("--from-file=")
            (directory / name).write_text(name)
    dry = [word for word in words if not word.startswith(("--dry-run", "--output"))]
    done = kubectl([*dry, "--dry-run=client", "--output=yaml"], directory)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = yaml.safe_load(done.stdout)
    return loaded


def test_the_manifests_mount_the_objects_that_the_page_creates(tmp_path: Path) -> None:
    found = [made(words, tmp_path) for words in commands() if words[0] == "create"]
    keys = {one["metadata"]["name"]: set(one["data"]) for one in found}
    assert keys == {
        **KEYS,
        "a2sf-hub": {"token"},
        "a2sf-study": CONNECTION,
        "a2sf-tables": {"mathqa.json"},
        "a2sf-data": {"calibration.jsonl", "validation.jsonl"},
    }
    rendered = yaml.dump_all(r for n in ("production", "tuner") for r in overlay_of(n).resources)
    for name in keys:
        assert re.search(rf"[nN]ame: {name}\n", rendered), name


@pytest.mark.parametrize(
    "words", [words for words in commands() if words[0] not in ("create", "config")], ids=" ".join
)
def test_every_other_command_needs_only_a_cluster(words: list[str], tmp_path: Path) -> None:
    words = [word.replace("$pod", "pod/a2sf-tuner-0") for word in words]
    if "-k" in words:
        directory = ROOT / words[words.index("-k") + 1]
        assert directory in kustomizations()
        words[words.index("-k") + 1] = str(directory)
    if "-f" in words:
        (tmp_path / "some.yaml").write_text("{apiVersion: v1, kind: ConfigMap}")
        words[words.index("-f") + 1] = "some.yaml"
    done = kubectl([*words, f"--server={NOBODY}"], tmp_path)
    assert done.returncode != 0
    assert "127.0.0.1:1" in done.stderr
    assert "refused" in done.stderr


def test_every_directory_is_on_the_page() -> None:
    (table,) = re.findall(r"^\| Directory .*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    cells = [line.split("|")[1] for line in table.strip().splitlines()[2:]]
    there = {path.parent for path in MANIFESTS.rglob("kustomization.yaml")}
    assert {MANIFESTS / name for cell in cells for name in re.findall("`(.*?)`", cell)} == there


def test_the_drain_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = overlay_of("production")
    options = settled(overlay, monkeypatch)
    settle, end = options.settle_s, options.settle_s + options.grace_s
    killed = overlay.pod["terminationGracePeriodSeconds"]
    assert f"| 0 to {settle:g}, `A2SF_SETTLE` |" in PAGE
    assert f"| {settle:g} to {end:g}, `A2SF_GRACE` |" in PAGE
    assert f"| {killed}, `terminationGracePeriodSeconds` |" in PAGE


def test_the_autoscaler_s_figures_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = overlay_of("production")
    scaler = overlay.one("HorizontalPodAutoscaler")["spec"]
    waiting, running = (m["pods"]["target"]["averageValue"] for m in scaler["metrics"])
    rows = settled(overlay, monkeypatch).max_batch
    assert f"more than {waiting} requests a server wait" in PAGE
    assert f"more than {running} of a server's {rows} rows" in PAGE


def test_metrics_and_versions_on_the_page_are_known() -> None:
    metrics = Metrics(["StreamGenerate"])
    metrics.serving(model="m", device="cpu", dtype="float32", load=Load, tables=Catalog)
    samples = {s.name for family in metrics.registry.collect() for s in family.samples}
    assert set(NAME.findall(PAGE)) <= samples
    assert f"Kubernetes {OLDEST} or newer" in PAGE
    assert f"schemas of Kubernetes {OLDEST} and {NEWEST}" in PAGE
