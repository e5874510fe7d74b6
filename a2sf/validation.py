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
    """Base of the values that callers build by hand: what does not fit is refused as all else is.

    Raises InvalidRequest with every field that does not fit, not pydantic's own error.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidRequest(problems(error, type(self))) from None


def problems(error: ValidationError, model: type[BaseModel] | None = None) -> list[tuple[str, str]]:
    """Turn pydantic's report into (field, problem) pairs, fields dotted; "" is the whole value.

    Strings that were given are shown only where a name was expected: any other may be a prompt or
    a secret. `model` is whose fields a field that there is not may have been meant for.
    """
    found = []
    for problem in error.errors(include_url=False):
        where, value = "", problem["input"]
        for part in problem["loc"]:
            where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
        match problem["type"]:
            case "literal_error":
                accepted = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
                told = f"{value!r}; accepted: {', '.join(accepted)}{did_you_mean(value, accepted)}"
            case "extra_forbidden" if model is not None:
                fields = list(model.model_fields)
                told = f"no such field; accepted: {', '.join(fields)}{did_you_mean(where, fields)}"
            case _:
                told = problem["msg"].removeprefix("Value error, ")
                # A whole part as the value is no help.
                if isinstance(value, (int, float)) and where:
                    told += f" (got {value!r})"
        found.append((where, told))
    return found


def first_problem(error: ValidationError) -> str:
    """Put pydantic's report into one line: where, what, and the value it was given."""
    problems = error.errors(include_url=False)
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    value = "" if isinstance(first["input"], (dict, list)) else f" (got {first['input']!r})"
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{where + ': ' if where else ''}{message}{value}{more}"
