"""Writes the alpha table's JSON Schema to `proto/`, for programs in other languages."""

import json
from pathlib import Path

from a2sf.schema import json_schema

TARGET = Path(__file__).resolve().parents[1] / "proto" / "alpha_table.schema.json"

if __name__ == "__main__":
    TARGET.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
