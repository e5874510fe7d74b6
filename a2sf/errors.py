"""All exceptions that this project raises on purpose.

Owns the kinds of failure. The service maps each kind to a status code in one table; the command
lines print the message on one line and exit with 2.

    A2SFError
    ├── InvalidArgument      a value of the caller is not accepted; names field and range
    │   └── InvalidRequest   several values are not accepted
    ├── NotFound             a model, dataset or table was not found
    ├── Unsupported          something valid that this program does not support
    │   └── NonFinite        a model returned NaN or infinity
    ├── TableError           an alpha table that cannot be used
    │   ├── TableCorrupt     not JSON, truncated, or its digest does not match
    │   ├── TableInvalid     complete, but a field is missing, unknown or out of range
    │   ├── TableTooNew      written by a newer program
    │   └── TableMismatch    made for another model
    ├── ResourceExhausted    no room now; the same call may succeed later
    ├── Unavailable          starting, draining or stopped
    ├── Unauthenticated      a call without the required credential
    ├── Conflict             the object was changed by another caller
    └── Aborted              the server ended the request: by an operator, or an unread stream
"""

import difflib
from collections.abc import Iterable


class A2SFError(Exception):
    """Base class. The message is one or two sentences that may be shown to the user."""

    request_id: str = ""
    """Id of the request in the server's log, if a server reported the error; else empty."""


class InvalidArgument(A2SFError, ValueError):
    """A value of the caller is not accepted.

    `field` is the caller's name for the value (dotted for nested fields); `problem` says what is
    wrong with it and what is accepted.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(_sentence(field, problem))
        self.field = field
        self.problem = problem
        self.violations: tuple[tuple[str, str], ...] = ((field, problem),)
        """All problems, as (field, problem) pairs."""


class InvalidRequest(InvalidArgument):
    """Several values are not accepted: `violations` has the (field, problem) pair of each.

    `field` and `problem` are those of the first pair. The field "" means the request as a whole.
    """

    def __init__(self, violations: Iterable[tuple[str, str]]) -> None:
        found = tuple(violations)
        super().__init__(*found[0])
        self.args = ("; ".join(_sentence(*one) for one in found),)
        self.violations = found


def _sentence(field: str, problem: str) -> str:
    return f"{field}: {problem}" if field else problem


class NotFound(A2SFError, LookupError):
    """Something was not found. The message says where we looked and what to do."""


class Unsupported(A2SFError):
    """Something valid that this program does not support, and refuses by name."""


class NonFinite(Unsupported):
    """A model returned NaN or infinity.

    The usual cause is an overflow in float16, or a weight that is not finite.
    """


class TableError(A2SFError):
    """An alpha table that cannot be used; previously loaded tables stay in use."""


class TableCorrupt(TableError):
    """The file is not JSON, is truncated, or its digest does not match."""


class TableInvalid(TableError):
    """The file is complete, but a field is missing, unknown, of a wrong type or out of range."""


class TableTooNew(TableError):
    """The file's schema version is newer than this program."""


class TableMismatch(TableError):
    """The table was made for a model of another shape or with other weights."""


class ResourceExhausted(A2SFError):
    """There is no room now; the same call may succeed later."""


class Unavailable(A2SFError):
    """The server is starting, draining or stopped."""


class Unauthenticated(A2SFError):
    """The call lacks the required credential. The message never repeats a given credential."""


class Conflict(A2SFError):
    """Another caller has changed the object: read it again, then decide."""


class Aborted(A2SFError):
    """The server ended a request early: an operator asked for it, or the client stopped reading."""


def did_you_mean(given: object, accepted: Iterable[str]) -> str:
    """A question that suggests the nearest accepted word; empty if none is near."""
    near = difflib.get_close_matches(given, list(accepted), 1) if isinstance(given, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def raise_if_fatal(error: BaseException) -> None:
    """Raise `error` again if it asks a thread or the process to end.

    All other errors are failures of the current work. That includes a panic in a Rust library such
    as tokenizers, which is a BaseException in Python, not an Exception.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, to quote in our own message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(":. ")


def one_line(error: BaseException, most: int = 300) -> str:
    """Return a library's error type and message on one line of at most `most` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":. ")
    return text if len(text) <= most else text[: most - 3] + "..."
