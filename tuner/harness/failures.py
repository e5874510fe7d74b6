"""Reports failures of single requests, after all others are answered.

Owns the wording. Knows nothing of what was asked.
"""

from collections.abc import Mapping

from a2sf.errors import NonFinite, first_line


def raise_first(failures: Mapping[int, BaseException], asked: int) -> None:
    """Raise the failure of the request with the lowest number, if any failed."""
    if not failures:
        return
    first = min(failures)
    error = failures[first]
    message = f"{len(failures)} of {asked} requests failed, the first as number {first + 1}: "
    message += first_line(error)
    raise (NonFinite if isinstance(error, NonFinite) else RuntimeError)(message) from error
