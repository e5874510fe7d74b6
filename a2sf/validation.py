"""Validation errors in plain words: each field that is wrong, the problem, and what is accepted.

Owns the translation of pydantic's reports, and `Given`, the base of the values that callers build
by hand. Knows nothing of any particular field.
"""

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from a2sf.errors import InvalidRequest, did_you_mean
from a2sf.schema import Frozen


class Given(Frozen):
    """Base of the values that callers build by hand.

    Raises InvalidRequest, not pydantic's error, with a problem for each invalid field.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidRequest(problems(error, type(self))) from None


def problems(error: ValidationError, model: type[BaseModel] | None = None) -> list[tuple[str, str]]:
    """Turn pydantic's report into (field, problem) pairs.

    Nested fields are dotted; the field "" is the whole value. A given string is shown only if a
    fixed name was expected: any other string may be a prompt or a secret. For an unknown field, the
    fields of `model` are suggested.
    """
    found = []
    for problem in error.errors(include_url=False):
        where, value = "", problem["input"]
        for part in problem["loc"]:
            where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
        match problem["type"]:
            case "literal_error":
                accepted = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
                text = f"{value!r}; accepted: {', '.join(accepted)}{did_you_mean(value, accepted)}"
            case "extra_forbidden" if model is not None:
                fields = list(model.model_fields)
                text = f"no such field; accepted: {', '.join(fields)}{did_you_mean(where, fields)}"
            case _:
                text = problem["msg"].removeprefix("Value error, ")
                # The value of a whole object would be too long.
                if isinstance(value, (int, float)) and where:
                    text += f" (got {value!r})"
        found.append((where, text))
    return found


def first_problem(error: ValidationError) -> str:
    """Return the first problem of pydantic's report on one line: field, problem, given value."""
    problems = error.errors(include_url=False)
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    value = "" if isinstance(first["input"], (dict, list)) else f" (got {first['input']!r})"
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{where + ': ' if where else ''}{message}{value}{more}"
