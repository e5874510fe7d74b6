"""The rules of reading tables again, over histories of what people and disks do to files.

They are written out once more, name by name, and whatever happens the catalog must agree.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from a2sf.errors import Conflict, NotFound, TableError
from a2sf.tablefile import save_table
from tests.service.backend.test_table_catalog import UNFIT, catalog, served
from tests.tables import IDENTITY, make_table

FILES, NAMES = ("a.json", "b.json", "c.json"), ("x", "y")
GOOD = (24, 25, UNFIT)
FOREIGN, CORRUPT, TRUNCATED = "foreign", "corrupt", "truncated"

Content = tuple[str, int] | str
Step = tuple[Any, ...]


def file_contents() -> dict[Content, bytes]:
    """The bytes of each good table, by name and budget, and of each kind of bad file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        made: dict[Content, bytes] = {}
        for name in NAMES:
            for budget in GOOD:
                save_table(make_table(IDENTITY, name=name, budget=budget), path)
                made[name, budget] = path.read_bytes()
        other = IDENTITY.model_copy(update={"fingerprint": "f" * 64})
        save_table(make_table(other, name="x"), path)
        made[FOREIGN] = path.read_bytes()
        made[CORRUPT] = made["x", 24].replace(b'"budget": 24', b'"budget": 26')
        made[TRUNCATED] = made["x", 24][:-200]
    return made


CONTENTS = file_contents()

file = st.sampled_from(FILES)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), file, st.sampled_from(list(CONTENTS))),
        st.tuples(st.just("delete"), file),
        st.tuples(st.just("rename"), file, file),
        st.tuples(st.just("activate"), st.sampled_from(("", *NAMES)), st.booleans()),
        st.tuples(st.just("reload")),
        st.tuples(st.just("reload")),
    ),
    max_size=25,
)


class Rules:
    """What should be served, name by name, from the files' contents and what was served before."""

    def __init__(self) -> None:
        self.files: dict[str, Content] = {}
        self.served: dict[str, tuple[int, str | None]] = {}
        """Budget of each name and the file that it is from, None where that is gone."""
        self.default: str | None = None

    def reload(self) -> None:
        before = dict(self.served)
        self.served = {
            name: found for name in NAMES if (found := self._now(name, before)) is not None
        }

    def _now(
        self, name: str, before: dict[str, tuple[int, str | None]]
    ) -> tuple[int, str | None] | None:
        budget, home = before.get(name, (None, None))

        def good(file: str) -> bool:
            content = self.files[file]
            if isinstance(content, str):
                return False
            unfit = content[0] == self.default and content[1] == UNFIT
            return not unfit or before[content[0]][0] == UNFIT

        if home in self.files and not good(home):
            assert budget is not None
            return budget, home  # a bad file changes nothing
        mine = [f for f in sorted(self.files) if good(f) and self.files[f][0] == name]
        # A file that was bad before may hold another name's earlier table no longer.
        chosen = home if home in mine else next(iter(mine), None)
        if chosen is not None:
            return int(self.files[chosen][1]), chosen
        return (budget, None) if budget is not None and name == self.default else None

    def activate(self, name: str) -> bool:
        if name and (name not in self.served or self.served[name][0] == UNFIT):
            return False
        past, self.default = self.default, name or None
        if past not in (None, self.default) and self.served[past][1] is None:
            del self.served[past]
        return True

    @property
    def refused_files(self) -> set[str]:
        """Files that are there and that nothing is served from as they are now."""
        used = {(home, (name, budget)) for name, (budget, home) in self.served.items()}
        return {file for file, content in self.files.items() if (file, content) not in used}


@given(steps)
@example([("write", "b.json", ("x", 24)), ("reload",), ("write", "a.json", ("x", 25)), ("reload",)])
@example(
    [
        ("write", "b.json", ("x", 24)),
        ("reload",),
        ("activate", "x", True),
        ("write", "b.json", ("x", UNFIT)),
        ("reload",),
    ]
)
@settings(max_examples=200)
def test_the_rules_predict_the_served_tables_for_any_file_changes(history: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder, capture_logs():
        directory = Path(folder)
        tables, rules, etags = catalog(directory), Rules(), dict[object, str]()
        for step in [*history, ("reload",)]:
            match step:
                case ("write", file, content):
                    (directory / file).write_bytes(CONTENTS[content])
                    rules.files[file] = content
                case ("delete", file):
                    (directory / file).unlink(missing_ok=True)
                    rules.files.pop(file, None)
                case ("rename", file, to) if file in rules.files:
                    (directory / file).rename(directory / to)
                    rules.files[to] = rules.files.pop(file)
                case ("activate", name, current):
                    if not current:
                        with pytest.raises(Conflict):
                            tables.activate(name, "stale")
                    elif rules.activate(name):
                        tables.activate(name, tables.now.etag)
                    else:
                        with pytest.raises((NotFound, TableError)):
                            tables.activate(name, tables.now.etag)
                case ("reload",):
                    rules.reload()
                    before, reloaded = tables.now, tables.reload()
                    now = tables.now
                    assert set(reloaded.added) == set(now.tables) - set(before.tables)
                    assert set(reloaded.removed) == set(before.tables) - set(now.tables)
                    named = {
                        f for f in FILES if any(f"{f}: " in str(w) for w in now.refused.values())
                    }
                    assert named == rules.refused_files
            assert served(tables) == {name: budget for name, (budget, _) in rules.served.items()}
            assert tables.now.default == rules.default
            state = (rules.default, tuple(sorted(served(tables).items())))
            assert etags.setdefault(state, tables.now.etag) == tables.now.etag
        assert len(set(etags.values())) == len(etags)
