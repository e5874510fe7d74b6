"""The manifests of a fit by many workers, and the tuner: flags, files, the shared study."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest
from psycopg.pq import Conninfo
from psycopg.sql import SQL

import tuner.fit
from a2sf.tablefile import load_table
from tests.docker.kubernetes import Rendered, Resource, overlay_of
from tests.docker.test_docker import last
from tests.tuner.conftest import sums, write_rows
from tests.tuner.postgres import postgresql
from tuner.__main__ import main
from tuner.data.datasets import REGISTRY, GeneratedDataset
from tuner.fit import FitSettings

PASSWORD = "p@ss/w:rd 100%"
"""Nothing that an address could hold as it is."""

CONNECTION = {"PGHOST", "PGUSER", "PGDATABASE", "PGPASSWORD"}
"""What the Secret a2sf-study holds that the page has people make."""


@pytest.fixture(scope="module", params=["tuner", "tuner-try"])
def overlay(request: pytest.FixtureRequest) -> Rendered:
    return overlay_of(request.param)


def job(overlay: Rendered) -> Resource:
    return dict(overlay.one("Job", "a2sf-tuner")["spec"])


def fit_and_table(overlay: Rendered) -> tuple[Resource, Resource]:
    """The container that fits, and the one that prints what came of it."""
    pod = job(overlay)["template"]["spec"]
    (fit,), (table,) = pod["initContainers"], pod["containers"]
    return fit, table


# As `python -m tuner`, with six uniform settings in the place of 88.
SMALL_TUNER = """
import tuner.search.uniform
from tuner.__main__ import main
tuner.search.uniform.GRID = tuner.search.uniform.GRID[::15]
main()
"""


class Read(Exception):
    """The tuner has read its flags."""


@pytest.fixture
def settings(overlay: Rendered, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FitSettings:
    """What the tuner makes of the flags; the volume of tables is a directory here."""

    def stop(settings: FitSettings) -> NoReturn:
        raise Read(settings)

    monkeypatch.setattr(tuner.fit, "fit", stop)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    fit, _ = fit_and_table(overlay)
    monkeypatch.setattr(sys, "argv", ["a2sf-tune", *placed(fit["args"], tmp_path)])
    with pytest.raises(Read) as caught:
        main()
    return caught.value.args[0]


def placed(words: list[str], directory: Path) -> list[str]:
    return [word.replace("/tables", str(directory)) for word in words]


def test_the_tuner_accepts_every_flag(settings: FitSettings) -> None:
    assert settings.storage == "postgresql://", "who connects, and how, is in the Secret alone"
    assert settings.study


def test_the_table_that_is_printed_is_the_one_that_is_written(
    overlay: Rendered, settings: FitSettings, tmp_path: Path
) -> None:
    fit, table = fit_and_table(overlay)
    assert placed(table["command"], tmp_path) == ["cat", str(settings.out)]
    (shown,) = table["volumeMounts"]
    assert shown["mountPath"] == "/tables"
    assert shown["name"] in {m["name"] for m in fit["volumeMounts"] if not m.get("readOnly")}


def test_the_dataset_is_made_or_where_the_tuner_looks_for_it(
    overlay: Rendered, settings: FitSettings
) -> None:
    fit, _ = fit_and_table(overlay)
    (variable,) = [w for w in last("tuner", "ENV").split() if w.startswith("A2SF_DATA_DIR=")]
    place = f"{variable.partition('=')[2]}/{settings.dataset}"
    in_place = place in {mount["mountPath"] for mount in fit["volumeMounts"]}
    assert in_place or isinstance(REGISTRY[settings.dataset], GeneratedDataset)


def test_a_gpu_is_asked_for_where_the_tuner_insists_on_one(
    overlay: Rendered, settings: FitSettings
) -> None:
    limits = fit_and_table(overlay)[0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu", 0) == {"cuda": 1, "cpu": 0}[settings.device]


def test_workers_are_alike_and_the_first_to_end_ends_the_job(overlay: Rendered) -> None:
    spec = job(overlay)
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] > 1
    assert spec["successPolicy"]["rules"] == [{"succeededCount": 1}]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_a_lost_worker_is_replaced_and_wrong_usage_ends_the_job(
    overlay: Rendered,
) -> None:
    spec = job(overlay)
    assert spec["backoffLimitPerIndex"] > 1
    lost, wrong_usage = spec["podFailurePolicy"]["rules"]
    assert lost["action"] == "Ignore"
    assert [c["type"] for c in lost["onPodConditions"]] == ["DisruptionTarget"]
    assert wrong_usage["action"] == "FailJob"
    # As the command line exits; a database that is away is 69, and worth another try.
    assert wrong_usage["onExitCodes"] == {"containerName": "fit", "operator": "In", "values": [2]}
    assert spec["template"]["spec"]["initContainers"][0]["name"] == "fit"


def test_the_connection_is_set_by_variables_of_postgresql(overlay: Rendered) -> None:
    known = {default.envvar.decode() for default in Conninfo.get_defaults() if default.envvar}
    assert known >= CONNECTION
    (source,) = fit_and_table(overlay)[0]["envFrom"]
    assert source == {"secretRef": {"name": "a2sf-study"}}


def test_the_database_for_trying_is_the_one_that_the_workers_connect_to() -> None:
    overlay = overlay_of("tuner-try")
    database = overlay.one("StatefulSet", "a2sf-postgresql")["spec"]
    (container,) = database["template"]["spec"]["containers"]
    sources = [v["valueFrom"]["secretKeyRef"] for v in container["env"] if "valueFrom" in v]
    assert {source["name"] for source in sources} == {"a2sf-study"}
    assert {source["key"] for source in sources} == CONNECTION - {"PGHOST"}
    labels = database["template"]["metadata"]["labels"]
    service = overlay.one("Service", database["serviceName"])["spec"]
    network = overlay.one("NetworkPolicy", "a2sf-postgresql")["spec"]
    assert service["selector"] == network["podSelector"]["matchLabels"] == labels
    (allowed,) = network["ingress"][0]["from"]
    workers = job(overlay)["template"]["metadata"]["labels"]
    assert allowed["podSelector"]["matchLabels"] == workers
    (port,) = container["ports"]
    assert port["containerPort"] == 5432
    assert (
        service["ports"][0]["targetPort"]
        == port["name"]
        == network["ingress"][0]["ports"][0]["port"]
    )


@pytest.fixture
def secret() -> Iterator[dict[str, str]]:
    """The variables that open a database which asks for its password."""
    with postgresql() as server:
        directory = server.database("study").partition("?host=")[2]
        alter = SQL("alter user fit password {}").format(PASSWORD)
        with psycopg.connect(f"host={directory} user=fit dbname=study") as connection:
            connection.execute(alter)
        Path(directory, "data", "pg_hba.conf").write_text("local all all scram-sha-256\n")
        server.restart()
        yield {
            "PGHOST": directory,
            "PGUSER": "fit",
            "PGDATABASE": "study",
            "PGPASSWORD": PASSWORD,
        }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_share_a_study_behind_a_password_and_both_print_its_table(
    secret: dict[str, str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert secret.keys() == CONNECTION
    data = write_rows(tmp_path / "sums.jsonl", sums(0, 200))
    fit, table = fit_and_table(overlay_of("tuner-try"))
    # A smaller fit: of two flags the last one counts.
    small = [
        *("--dataset", str(data), "--model", str(tiny_model_dir)),
        *("--trials", "6", "--examples", "2", "--holdout", "4", "--length", "128"),
    ]
    places = [tmp_path / f"worker-{index}" for index in range(2)]
    environment = {**os.environ, **secret, "OMP_NUM_THREADS": "1"}
    workers = []
    for place in places:
        place.mkdir()
        command = [sys.executable, "-c", SMALL_TUNER, *placed(fit["args"], place), *small]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    said = [worker.communicate(timeout=240)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert PASSWORD not in "".join(said)
    printed = [
        subprocess.run(placed(table["command"], place), check=True, capture_output=True).stdout
        for place in places
    ]
    found = [json.loads(text) for text in printed]
    assert found[0]["policy"] == found[1]["policy"]
    (tmp_path / "printed.json").write_bytes(printed[0])
    search = load_table(tmp_path / "printed.json").search
    assert (search.study, search.storage) == ("recall", "postgresql")
