"""Maps error classes to gRPC statuses and back, with one table.

Owns the codes, the google.rpc details, and what a client may learn about a failure. An error that
is not an A2SFError becomes INTERNAL without its text, which may contain anything: the text goes to
the log, with the request id that the client gets. Knows nothing of handlers or channels.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from a2sf import errors
from a2sf.errors import InvalidRequest
from service.telemetry.logs import LoggedFailure

log = structlog.get_logger(__name__)

DOMAIN = "a2sf.inference.v1"
"""The domain of the reasons in ErrorInfo details."""

RETRY_AFTER_MS = 500
"""Retry delay for RESOURCE_EXHAUSTED; a completion takes about as long or longer."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailer with the retry delay, which gRPC clients with a retry policy follow by themselves."""

NO_REQUEST_ID = "-"
"""The request id of a call that failed before the server gave it one."""

DETAILS_KEY = "grpc-status-details-bin"
"""Trailer that carries the google.rpc status."""

MAX_METADATA_BYTES = 16 * 2**10
"""Largest metadata that server and client accept, as HTTP/2 counts it: names, values, and 32 bytes
per entry."""

METADATA_OPTIONS = (
    # Above the first limit, by default 8 KiB, gRPC refuses at random; above the second, always.
    # With equal limits, a call is either always refused or never.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
)
"""The gRPC options of that limit, for servers and channels."""

CODES: dict[type[errors.A2SFError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.NonFinite: grpc.StatusCode.UNIMPLEMENTED,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.TableCorrupt: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TableInvalid: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TableTooNew: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TableMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TableError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.Aborted: grpc.StatusCode.ABORTED,
}
"""Status code of each class; a subclass without an entry uses its nearest parent's."""

VIOLATIONS_BYTES = 2100
"""Bytes for the violations in a status, about a hundred for each. Some other gRPC clients drop
trailers larger than 8 KiB, and the status with them."""

_CLASSES = {cls.__name__: cls for cls in CODES}
_BY_CODE = {code: cls for cls, code in CODES.items()}  # the last class of a code represents it


class Violations:
    """Collects everything that is invalid in a request, so that one error reports all of it."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Record an InvalidArgument that the block raises, and continue after the block."""
        try:
            yield
        except errors.InvalidArgument as error:
            self._found.extend(error.violations)

    def check(self) -> None:
        """Raise InvalidRequest if anything was recorded."""
        if self._found:
            raise InvalidRequest(self._found)


class NoRoom(errors.ResourceExhausted):
    """The server has no room now. `retry_after_s`: its retry delay, or None."""

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RemoteError(errors.A2SFError):
    """The server failed or the call was interrupted; see the message.

    `code` is the status code of the call.
    """

    def __init__(self, message: str, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN) -> None:
        super().__init__(message)
        self.code = code


class DeadlineExceeded(RemoteError):
    """The call's deadline passed; the call was cancelled on the server too."""


class Cancelled(RemoteError):
    """The call was cancelled: its channel was closed, or an intermediary cancelled it."""


@contextmanager
def field_prefix(where: str) -> Iterator[None]:
    """Prefix the fields of InvalidRequest with `where`, such as `input.sampling`."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(
            (_within(where, f), problem) for f, problem in error.violations
        ) from None


def _within(where: str, field: str) -> str:
    return f"{where}.{field}" if where and field else where or field


@dataclass(frozen=True)
class WireStatus:
    """Arguments of a servicer context's `abort`."""

    code: grpc.StatusCode
    details: str
    trailers: tuple[tuple[str, str | bytes], ...]


def to_wire(error: BaseException, request_id: str) -> WireStatus:
    """Convert `error` to a status with details; log causes that the client must not see."""
    reason = next((cls for cls in type(error).__mro__ if cls in CODES), None)
    if reason is None:
        if not isinstance(error, LoggedFailure):
            log.error("internal error", request_id=request_id, exc_info=error)
        code, message = grpc.StatusCode.INTERNAL, f"internal error; request id {request_id}"
        name = "Internal"
    else:
        code, message, name = CODES[reason], _truncate(str(error), 768), reason.__name__
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.append(
        _pack(
            error_details_pb2.ErrorInfo(
                reason=name, domain=DOMAIN, metadata={"request_id": request_id}
            )
        )
    )
    trailers: list[tuple[str, str | bytes]] = []
    if isinstance(error, errors.InvalidArgument):
        status.details.append(_pack(_bad_request(error.violations)))
    elif isinstance(error, errors.TableError):
        failure = error_details_pb2.PreconditionFailure
        unmet = failure.Violation(
            type=name, subject="alpha table", description=_truncate(message, 384)
        )
        status.details.append(_pack(failure(violations=[unmet])))
    elif isinstance(error, errors.ResourceExhausted):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(RETRY_AFTER_MS)
        status.details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
        trailers.append((PUSHBACK_KEY, str(RETRY_AFTER_MS)))
    rich = rpc_status.to_status(status)
    return WireStatus(code, message, (*rich.trailing_metadata, *trailers))


def _bad_request(violations: Sequence[tuple[str, str]]) -> error_details_pb2.BadRequest:
    bad_request, room = error_details_pb2.BadRequest(), VIOLATIONS_BYTES
    for index, (field, problem) in enumerate(violations):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_truncate(field, 128), description=_truncate(problem, 384)
        )
        room -= violation.ByteSize()
        if room < 0:
            bad_request.field_violations.add(description=f"and {len(violations) - index} more")
            break
        bad_request.field_violations.append(violation)
    return bad_request


def code_of(error: errors.A2SFError) -> grpc.StatusCode:
    """Return the status code of `error`, raised by the server or by the client."""
    if isinstance(error, RemoteError):
        return error.code
    return next(CODES[cls] for cls in type(error).__mro__ if cls in CODES)


def from_wire(error: grpc.RpcError, timeout_s: float | None = None) -> errors.A2SFError:
    """Convert a failed call to the error that the server raised, as far as it is known.

    Its `request_id` is the server's, or empty if the status has no details. `timeout_s` is the
    deadline of the call, for the message if it passed.
    """
    # At runtime, every error of a call is also a call, for both kinds of channel; its static type
    # does not say so.
    call: Any = error
    code, message = call.code(), call.details() or ""
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in _details(call):
        for message_type in (info, bad_request, retry):
            if detail.Is(message_type.DESCRIPTOR):
                detail.Unpack(message_type)
    converted = _converted(code, message, info, bad_request, retry, timeout_s)
    request_id = info.metadata.get("request_id", "") if info.domain == DOMAIN else ""
    if request_id != NO_REQUEST_ID:
        converted.request_id = request_id
    return converted


def _converted(
    code: grpc.StatusCode,
    message: str,
    info: error_details_pb2.ErrorInfo,
    bad_request: error_details_pb2.BadRequest,
    retry: error_details_pb2.RetryInfo,
    timeout_s: float | None,
) -> errors.A2SFError:
    if bad_request.field_violations:
        return InvalidRequest((v.field, v.description) for v in bad_request.field_violations)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        limit = f" of {timeout_s:g} s" if timeout_s is not None else ""
        return DeadlineExceeded(f"the deadline{limit} passed before the call was complete", code)
    if code is grpc.StatusCode.CANCELLED:
        return Cancelled(f"the call was cancelled: {message}", code)
    named = _CLASSES.get(info.reason) if info.domain == DOMAIN else None
    cls = named or _BY_CODE.get(code)
    if cls is None or cls is errors.InvalidArgument:
        return RemoteError(f"{code.name}: {message}", code)
    if cls is errors.ResourceExhausted:
        if named is None:
            # Raised by gRPC itself, for a fixed limit: metadata or message are too large.
            part = "metadata" if "metadata size" in message else "request"
            return errors.InvalidArgument(part, message)
        has_delay = retry.HasField("retry_delay")
        return NoRoom(message, retry.retry_delay.ToMilliseconds() / 1000 if has_delay else None)
    return cls(message)


def _details(call: Any) -> Iterable[Any]:
    packed = dict(call.trailing_metadata() or ()).get(DETAILS_KEY)
    return () if packed is None else status_pb2.Status.FromString(packed).details


def _truncate(text: str, size: int) -> str:
    """Shorten text, which may quote the caller's value, to `size` bytes of UTF-8."""
    encoded = text.encode()
    if len(encoded) <= size:
        return text
    # A character that would be split is removed.
    return encoded[: size - 3].decode(errors="ignore") + "..."


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
