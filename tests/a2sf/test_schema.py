"""The alpha table's file: whole or refused, and the same in every program that reads it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from a2sf import schema, tablefile
from a2sf.errors import NotFound, TableCorrupt, TableInvalid, TableMismatch, TableTooNew
from a2sf.schema import ModelIdentity
from a2sf.tablefile import canonical_digest, load_table, parse_table, save_table, seal
from tests.tables import IDENTITY, brought_up, make_table, table_fields, version_1, version_2

ROOT = Path(__file__).resolve().parents[2]


def document() -> dict[str, Any]:
    return make_table(IDENTITY).model_dump(mode="json")


def as_file(changed: dict[str, Any]) -> bytes:
    """A file whose digest is right, whatever else is wrong with it."""
    return json.dumps({**changed, "sha256": canonical_digest(changed)}).encode()


def test_a_table_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    table = make_table(IDENTITY)
    save_table(table, tmp_path / "t.json")
    assert load_table(tmp_path / "t.json", IDENTITY) == table
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_the_digest_is_the_one_of_the_canonical_json(tmp_path: Path) -> None:
    save_table(make_table(IDENTITY, name="na-me"), tmp_path / "t.json")
    # As a program in any language would: parse, drop, sort, no spaces, UTF-8, hash.
    script = (
        "import json,sys,hashlib;d=json.load(open(sys.argv[1]));s=d.pop('sha256');"
        "t=json.dumps(d,sort_keys=True,separators=(',',':'),ensure_ascii=False);"
        "print(s==hashlib.sha256(t.encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "t.json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.strip() == "True"


def test_the_exported_json_schema_equals_the_one_of_the_code() -> None:
    exported = json.loads((ROOT / "proto" / "alpha_table.schema.json").read_text())
    assert exported == schema.json_schema()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(keep: float) -> None:
    data = as_file(document())
    with pytest.raises(TableCorrupt, match="cut short"):
        parse_table(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe",
        b"[]",
        b"3",
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
def test_a_file_that_is_no_table_is_refused(data: bytes) -> None:
    with pytest.raises(TableCorrupt):
        parse_table(data)


def test_a_file_changed_by_hand_is_refused() -> None:
    changed = document()
    changed["policy"]["alpha"][0][0] = 0.123
    with pytest.raises(TableCorrupt, match="changed or damaged"):
        parse_table(json.dumps(changed).encode())


def test_a_newer_file_is_refused_by_version() -> None:
    newer = {**document(), "schema_version": 4, "unheard_of": 1}
    with pytest.raises(TableTooNew, match="schema_version is 4, and this program reads up to 3"):
        parse_table(as_file(newer))
    with pytest.raises(TableTooNew):
        parse_table(json.dumps(newer).encode())


def set_in(changed: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        changed = changed[part]
    changed[last] = value


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("policy.alpha", [[0.5, 1.5], [0.5, 0.5]], "policy.alpha.0.1: .*less than or equal to 1"),
        ("policy.alpha", [[0.5, -0.1], [0.5, 0.5]], "greater than or equal to 0"),
        ("policy.alpha", [[0.5, "0.5"], [0.5, 0.5]], "valid number"),
        ("policy.alpha", [[0.5, 0.5]], "1 layers, model 2"),
        ("policy.alpha", [[0.5, 0.5], [0.5]], "1 heads, model 2"),
        ("policy.head_share", [[1.0, 1.0]], "policy.head_share has 1 layers, model 2"),
        ("policy.head_share", [[1.0], [1.0, 1.0]], r"policy.head_share\[0\] has 1 heads, model 2"),
        ("policy.head_share", [[2.0, 0.0], [1.0, 1.0]], "head_share.0.1: .*greater than 0"),
        ("policy.head_share", [2.0, 1.0], "head_share.0: .*valid array"),
        ("policy.layer_share", [1.0, 1.0], "layer_share: Extra inputs"),
        ("policy.budget", 0, "greater than or equal to 1"),
        ("policy.budget_ratio", 0.5, "exactly one of budget and budget_ratio"),
        ("policy.min_budget", -1, "min_budget: .*greater than or equal to 0"),
        ("policy.min_budget", 0.5, "min_budget: .*valid integer"),
        ("policy.recent", None, "exactly one of recent and recent_share"),
        ("name", "../escape", "pattern"),
        ("created_at", "yesterday", "created_at"),
        ("evidence.verdict", "splendid", "no_better_than_uniform"),
        ("policy.surprise", 1, "Extra inputs"),
        ("schema_version", 0, "accepted: 1"),
        ("schema_version", "1", "accepted: 1"),
        ("schema_version", True, "accepted: 1"),
    ],
)
def test_a_whole_file_with_a_wrong_field_is_refused_by_field(
    path: str, value: Any, says: str
) -> None:
    changed = document()
    set_in(changed, path, value)
    with pytest.raises(TableInvalid, match=says):
        parse_table(as_file(changed))


@pytest.mark.parametrize("older", [version_1, version_2])
def test_a_table_from_before_floors_leaves_the_floor_to_the_server(
    older: Callable[[ModelIdentity], dict[str, Any]],
) -> None:
    assert "min_budget" not in older(IDENTITY)["policy"]
    table = parse_table(json.dumps(older(IDENTITY)).encode())
    assert table.model_dump(mode="json")["policy"]["min_budget"] is None


@pytest.mark.parametrize("floor", [0, 64, None])
def test_a_table_keeps_its_floor(floor: int | None, tmp_path: Path) -> None:
    table = make_table(IDENTITY, budget=None, budget_ratio=0.2, min_budget=floor)
    save_table(table, tmp_path / "t.json")
    assert load_table(tmp_path / "t.json").policy.min_budget == floor


def test_a_file_in_another_notation_has_the_digest_of_its_full_form(
    tmp_path: Path,
) -> None:
    table = make_table(IDENTITY, head_share=((1.0, 1.0), (1.0, 1.0)))
    shorter = document()
    for name in ("budget_ratio", "min_budget", "recent_share"):
        del shorter["policy"][name]
    shorter["policy"]["head_share"] = [[1, 1], [1, 1]]
    read = parse_table(as_file(shorter))
    assert read == table
    # A client reads it from its canonical JSON, and a program may write it again.
    text = tablefile.canonical_json(read.model_dump(mode="json"))
    assert parse_table(text.encode()) == read
    save_table(read, tmp_path / "again.json")
    assert load_table(tmp_path / "again.json") == read


def test_a_missing_field_is_refused_by_name() -> None:
    changed = document()
    del changed["calibration"]["seed"]
    with pytest.raises(TableInvalid, match=r"calibration\.seed: Field required"):
        parse_table(as_file(changed))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 3}, "num_layers is 2 in the table and 3 in the model"),
        ({"num_kv_heads": 4}, "num_kv_heads is 2 in the table and 4 in the model"),
        ({"architecture": "Qwen3ForCausalLM"}, "architecture"),
        ({"fingerprint": "b" * 64}, "the weights differ"),
    ],
)
def test_a_table_of_another_model_is_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    save_table(make_table(IDENTITY), tmp_path / "t.json")
    with pytest.raises(TableMismatch, match=says) as caught:
        load_table(tmp_path / "t.json", IDENTITY.model_copy(update=change))
    assert "t.json" in str(caught.value)


def test_another_name_for_the_same_weights_is_accepted(tmp_path: Path) -> None:
    save_table(make_table(IDENTITY), tmp_path / "t.json")
    renamed = IDENTITY.model_copy(update={"id": "elsewhere", "revision": "main"})
    assert load_table(tmp_path / "t.json", renamed).model.id == "m"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.json: No such file"):
        load_table(tmp_path / "none.json")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with path.open("wb") as file:
        file.truncate(tablefile.MAX_FILE_BYTES + 1)
    with pytest.raises(TableInvalid, match="larger than"):
        load_table(path)


def test_an_old_file_is_brought_up_step_by_step_with_a_new_digest() -> None:
    def two(old: dict[str, Any]) -> dict[str, Any]:
        return {**old, "colour": "none"}

    def three(old: dict[str, Any]) -> dict[str, Any]:
        return {**{k: v for k, v in old.items() if k != "colour"}, "shade": old["colour"]}

    before = {**document(), "schema_version": 1}
    after = tablefile.upgrade(before, steps={1: two, 2: three}, current=3)
    assert (after["schema_version"], after["shade"]) == (3, "none")
    assert "colour" not in after
    assert after["sha256"] == canonical_digest(after) != before["sha256"]
    assert before["schema_version"] == 1, "the document that was given is left as it was"
    with pytest.raises(TableInvalid, match="is no longer supported; fit the table again"):
        tablefile.upgrade(before, steps={2: three}, current=3)


def test_a_file_of_version_1_keeps_its_meaning() -> None:
    table = brought_up(IDENTITY)
    assert (table.schema_version, table.policy.head_share) == (3, ((1.0, 1.0), (1.0, 1.0)))
    assert (table.evidence.p_holm, table.evidence.uniform, table.search.stages) == ({}, None, ())
    same = seal(
        **{
            name: getattr(table, name)
            for name in type(table).model_fields
            if name not in ("schema_version", "sha256")
        }
    )
    assert same == table


@pytest.mark.parametrize("older", [version_1, version_2])
def test_a_table_of_an_older_version_can_be_written_again(
    older: Callable[[ModelIdentity], dict[str, Any]], tmp_path: Path
) -> None:
    table = parse_table(json.dumps(older(IDENTITY)).encode())
    save_table(table, tmp_path / "again.json")
    assert load_table(tmp_path / "again.json") == table


def test_each_head_of_a_file_of_version_2_gets_its_layer_s_share() -> None:
    table = parse_table(json.dumps(version_2(IDENTITY)).encode())
    assert (table.schema_version, table.policy.head_share) == (3, ((1.0, 1.0), (1.5, 1.5)))
    upgraded = json.loads(tablefile.canonical_json(table.model_dump(mode="json")))
    assert table.sha256 == canonical_digest(upgraded) != version_2(IDENTITY)["sha256"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer_share": [1.0]}, "head_share"),
        ({"layer_share": 3}, "head_share"),
        ({"layer_share": [1.0, "2"]}, "head_share.1.0: .*valid number"),
        ({"layer_share": [1.0, -2.0]}, "head_share.1.0: .*greater than 0"),
        ({"alpha": 3}, "alpha"),
    ],
)
def test_a_broken_policy_of_version_2_names_the_field(change: dict[str, Any], says: str) -> None:
    changed = version_2(IDENTITY)
    changed["policy"] |= change
    with pytest.raises(TableInvalid, match=says):
        parse_table(as_file(changed))


def test_a_file_of_version_2_without_shares_is_refused() -> None:
    changed = version_2(IDENTITY)
    del changed["policy"]["layer_share"]
    with pytest.raises(TableInvalid, match=r"policy\.head_share: Field required"):
        parse_table(as_file(changed))


@pytest.mark.parametrize("part", ["policy", "evidence", "search"])
def test_a_broken_file_of_version_1_names_the_field(part: str) -> None:
    with pytest.raises(TableInvalid, match=part):
        parse_table(as_file({**version_1(IDENTITY), part: 3}))


def test_a_value_out_of_range_cannot_be_sealed() -> None:
    fields = table_fields(IDENTITY)
    fields["name"] = "a/b"
    with pytest.raises(TableInvalid, match="name"):
        seal(**fields)


def test_a_writer_killed_at_any_moment_leaves_a_whole_table(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save_table(make_table(IDENTITY), path)
    script = (
        "import sys;from pathlib import Path;from a2sf.tablefile import *;"
        "t=load_table(Path(sys.argv[1]));print('go',flush=True)\n"
        "while True: save_table(t,Path(sys.argv[1]))"
    )
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert writer.stdout is not None
        with writer.stdout:
            assert writer.stdout.readline() == b"go\n"
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait(timeout=30)
        assert load_table(path).name == "made-up"
