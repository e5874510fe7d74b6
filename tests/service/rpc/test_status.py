"""Errors cross the wire unchanged; unknown errors are hidden."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from structlog.testing import capture_logs

from a2sf import errors
from a2sf.errors import InvalidRequest
from a2sf.policy import CachePolicy
from service.status import (
    CODES,
    DETAILS_KEY,
    NO_REQUEST_ID,
    PUSHBACK_KEY,
    RemoteError,
    WireStatus,
    field_prefix,
    from_wire,
    to_wire,
)


def every_error() -> list[errors.A2SFError]:
    def below(cls: type[errors.A2SFError]) -> list[type[errors.A2SFError]]:
        return [cls, *(deeper for sub in cls.__subclasses__() for deeper in below(sub))]

    ours = [cls for cls in below(errors.A2SFError) if cls.__module__ == "a2sf.errors"]
    return [
        InvalidRequest([("max_new_tokens", "0; accepted: 1 or more"), ("stop", "too many")])
        if cls is InvalidRequest
        else cls("max_new_tokens", "0; accepted: 1 or more")
        if cls is errors.InvalidArgument
        else cls("in plain words")
        for cls in ours
        if cls is not errors.A2SFError
    ]


def over_the_wire(status: WireStatus) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        status.code,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(*status.trailers),
        details=status.details,
    )


def details(status: WireStatus) -> status_pb2.Status:
    return status_pb2.Status.FromString(dict(status.trailers)[DETAILS_KEY])


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_an_error_arrives_with_the_same_class_and_message(error: errors.A2SFError) -> None:
    back = from_wire(over_the_wire(to_wire(error, "r1")))
    assert isinstance(back, type(error))
    assert str(back) == str(error)
    assert back.request_id == "r1"
    if isinstance(error, errors.InvalidArgument):
        assert isinstance(back, errors.InvalidArgument)
        assert back.violations == error.violations


def test_every_error_class_has_a_status() -> None:
    # Several violations go by the row of one.
    assert {type(error) for error in every_error()} - {InvalidRequest} == set(CODES)


def test_an_unknown_error_is_hidden_from_the_client_and_logged() -> None:
    cause = RuntimeError("secret of the house")
    with capture_logs() as lines:
        status = to_wire(cause, "r7")
    assert status.code is grpc.StatusCode.INTERNAL
    assert "r7" in status.details
    assert "secret" not in status.details
    assert b"secret" not in dict(status.trailers)[DETAILS_KEY]
    (line,) = lines
    assert (line["exc_info"], line["request_id"]) == (cause, "r7")
    assert type(from_wire(over_the_wire(status))) is RemoteError


def test_a_status_always_fits_into_the_trailers() -> None:
    long = "ß" * 100_000
    violations = [(f"{long}[{number}]", long) for number in range(1000)]
    for error in (errors.NotFound(long), InvalidRequest(violations)):
        status = to_wire(error, "r" * 128)
        size = len(status.details.encode()) * 3
        size += sum(len(value) * 4 / 3 for _, value in status.trailers)
        assert size < 8192
        assert str(from_wire(over_the_wire(status))).count("ß") > 30
    assert "and 996 more" in repr(details(status))


def test_resource_exhausted_carries_a_retry_delay() -> None:
    status = to_wire(errors.ResourceExhausted("full"), "r1")
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in details(status).details)
    assert retry.retry_delay.ToMilliseconds() == int(dict(status.trailers)[PUSHBACK_KEY])


def test_all_invalid_fields_are_reported_together() -> None:
    with pytest.raises(InvalidRequest) as caught, field_prefix("input.cache_policy"):
        CachePolicy(alpha=1.5, budget=0)
    back = from_wire(over_the_wire(to_wire(caught.value, "r1")))
    assert isinstance(back, InvalidRequest)
    assert {field for field, _ in back.violations} == {
        "input.cache_policy.alpha",
        "input.cache_policy.budget",
    }


def test_a_passed_deadline_is_reported_with_its_length() -> None:
    late = over_the_wire(WireStatus(grpc.StatusCode.DEADLINE_EXCEEDED, "", ()))
    assert "1.5 s" in str(from_wire(late, 1.5))


def test_a_status_from_elsewhere_is_converted_by_its_code() -> None:
    refused = over_the_wire(WireStatus(grpc.StatusCode.UNAVAILABLE, "no connection", ()))
    back = from_wire(refused)
    assert isinstance(back, errors.Unavailable)
    assert back.request_id == ""


def test_a_call_without_a_request_id_has_an_empty_one() -> None:
    back = from_wire(over_the_wire(to_wire(errors.NotFound("gone"), NO_REQUEST_ID)))
    assert back.request_id == ""
