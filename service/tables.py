"""The alpha tables that requests may name: a directory read once, when the server starts.

Owns finding and checking the files, and keeping the reason why one was refused, so that a request
that names it is told that very reason. A request's name is only ever looked up among the tables
already read; no path is built from it. Knows nothing of messages or of the engine.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from a2sf.errors import NotFound, TableError, TableInvalid
from a2sf.schema import AlphaTable, ModelIdentity, load_table

log = logging.getLogger(__name__)


class TableStore:
    """Alpha tables by name, and the errors of those that cannot be used."""

    def __init__(
        self,
        tables: Mapping[str, AlphaTable] | None = None,
        refused: Mapping[str, TableError] | None = None,
    ) -> None:
        self.tables = dict(sorted((tables or {}).items()))
        self.refused = dict(sorted((refused or {}).items()))

    @classmethod
    def read(cls, directory: Path, identity: ModelIdentity) -> "TableStore":
        """Read every `*.json` of `directory`; a bad file is logged and keeps no other out."""
        tables: dict[str, AlphaTable] = {}
        refused: dict[str, TableError] = {}
        for path in sorted(directory.glob("*.json")):
            # Until the file tells the table's name, it goes by its own.
            name = path.stem
            try:
                table = load_table(path)
                name = table.name
                if name in tables:
                    raise TableInvalid(f"alpha table {path}: another file has the name {name!r}")
                table.check_model(identity)
            except NotFound as error:
                log.warning("table=%s refused: %s", name, error)
            except TableError as error:
                log.warning("table=%s refused: file %s: %s", name, path, error)
                # The server's paths are no client's business.
                told = str(error).replace(f"alpha table {path}", f"alpha table {path.name}")
                refused.setdefault(name, type(error)(told))
            else:
                log.info("table=%s sha256=%s file=%s", name, table.sha256, path)
                tables[name] = table
        return cls(tables, {name: why for name, why in refused.items() if name not in tables})

    def lookup(self, name: str) -> AlphaTable:
        """Return the table of this name.

        Raises NotFound, naming the tables there are; for a table that was refused, the error that
        it was refused with.
        """
        if name in self.tables:
            return self.tables[name]
        if name in self.refused:
            refusal = self.refused[name]
            raise type(refusal)(str(refusal))
        known = ", ".join(self.tables) or "none"
        raise NotFound(f"no alpha table {name!r}; served: {known}")
