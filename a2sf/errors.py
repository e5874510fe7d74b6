"""The one tree of exceptions that this project raises on purpose.

Owns the kinds of failure, not their wording on any wire: the service maps each kind to a status
code in one table, the command lines print the message as one line and exit 2.

    A2SFError
    ├── InvalidArgument      a value the caller chose is not accepted; names field and range
    │   └── InvalidRequest   several are not
    ├── NotFound             a model, dataset or table that is not where one looked
    ├── Unsupported          something real that this program refuses by name
    │   └── NonFinite        a model gave NaN or infinity where a number was needed
    ├── TableError           an alpha table that cannot be used
    │   ├── TableCorrupt     not whole: not JSON, cut short, or its digest does not match
    │   ├── TableInvalid     whole, but a field is missing, unknown or out of range
    │   ├── TableTooNew      written by a newer program
    │   └── TableMismatch    made for another model
    ├── ResourceExhausted    no room now; the same call may succeed later
    ├── Unavailable          starting, draining or stopped
    ├── Unauthenticated      a call without the credential that it needs
    ├── Conflict             what was to be changed has been changed by another meanwhile
    └── Aborted              ended by the server before its time: told to, or nobody read it
"""

from collections.abc import Iterable


class A2SFError(Exception):
    """Root of the tree. Its message is one sentence or two, fit to be shown to the user."""


class InvalidArgument(A2SFError, ValueError):
    """A value the caller chose is not accepted.

    `field` is the name under which the caller set it (dotted for nested fields); `problem` says
    what is wrong with the value and what would be accepted.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(_sentence(field, problem))
        self.field = field
        self.problem = problem
        self.violations: tuple[tuple[str, str], ...] = ((field, problem),)
        """All that is not accepted, as (field, problem) pairs."""


class InvalidRequest(InvalidArgument):
    """Several values are not accepted: `violations` are the (field, problem) pairs of all.

    `field` and `problem` are those of the first. "" is the field of what is wrong with the whole.
    """

    def __init__(self, violations: Iterable[tuple[str, str]]) -> None:
        found = tuple(violations)
        super().__init__(*found[0])
        self.args = ("; ".join(_sentence(*one) for one in found),)
        self.violations = found


def _sentence(field: str, problem: str) -> str:
    return f"{field}: {problem}" if field else problem


class NotFound(A2SFError, LookupError):
    """A named thing is not where one looked. The message says where that was and what to do."""


class Unsupported(A2SFError):
    """Something real that this program refuses by name, rather than doing it wrongly."""


class NonFinite(Unsupported):
    """A model gave NaN or infinity where a number was needed.

    Most often its activations overflow in float16, or one of its weights is not finite.
    """


class TableError(A2SFError):
    """An alpha table that cannot be used; whatever was loaded before stays in use."""


class TableCorrupt(TableError):
    """The file is not a whole table: not JSON, cut short, or its digest does not match."""


class TableInvalid(TableError):
    """The file is whole, but a field is missing, unknown, of the wrong type or out of range."""


class TableTooNew(TableError):
    """The file's schema version is newer than this program."""


class TableMismatch(TableError):
    """The table was made for a model of another shape or with other weights."""


class ResourceExhausted(A2SFError):
    """There is no room now; the same call may succeed later."""


class Unavailable(A2SFError):
    """The server is starting, draining or stopped."""


class Unauthenticated(A2SFError):
    """The call lacks the credential that it needs. The message never repeats what was given."""


class Conflict(A2SFError):
    """What was to be changed is no longer as the caller saw it: read it again, then decide."""


class Aborted(A2SFError):
    """The server ended a request before its time: an operator said so, or nobody read it."""


def raise_if_fatal(error: BaseException) -> None:
    """Raise `error` again if it asks a thread or the process to end.

    Every other error belongs to the work at hand. That includes a panic in a library written in
    Rust, such as tokenizers, which Python sees as a BaseException and not as an Exception.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error


def first_line(error: BaseException) -> str:
    """Put a library's message into one line, for a sentence of our own around it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(":. ")


def one_line(error: BaseException, most: int = 300) -> str:
    """Put a library's message and its kind into one line of at most `most` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":. ")
    return text if len(text) <= most else text[: most - 3] + "..."
