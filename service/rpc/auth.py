"""Bearer tokens from a file, checked before any handler runs.

Owns reading the file, reading it again when it changes, the comparison, and the refusal. Tokens are
stored as digests. Neither they nor a caller's credentials are ever logged or returned. Knows
nothing of what calls do.
"""

import hashlib
import hmac
import re
import stat
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from a2sf.errors import InvalidArgument, Unauthenticated
from service.config import files
from service.status import to_wire
from service.telemetry.metrics import Metrics

if TYPE_CHECKING:
    # Generic only in the type stubs.
    Handler = grpc.RpcMethodHandler[Any, Any]

log = structlog.get_logger(__name__)

MIN_TOKEN_CHARACTERS = 16

CHECK_S = 1.0
"""Minimum seconds between two checks of the file for changes."""

# Characters that are valid in a header and unambiguous in a line of a file.
_TOKEN = re.compile(rf"[\x21-\x7e]{{{MIN_TOKEN_CHARACTERS},}}")

_HEALTH = "/grpc.health.v1.Health/"
"""Health is open to all: probes have no token, and learn only whether the server serves."""


class TokenFile:
    """The tokens of a file, one per line; blank lines and lines that begin with `#` are skipped.

    A call reads a changed file again, if the last look at it is a second ago. If the new content is
    invalid, the error is logged and the earlier tokens stay valid.
    """

    def __init__(self, path: Path, flag: str) -> None:
        """Read the file given by `flag`. Raises InvalidArgument if it contains no valid tokens."""
        self._path = path
        self._flag = flag
        self._stamp = files.stamp(path)
        self._digests = _read(path, flag)
        self._checked = time.monotonic()
        if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            log.warning("token file can be read by other users", file=str(path), flag=flag)

    def accepts(self, token: str) -> bool:
        """Whether `token` is in the file. Takes the same time for every token."""
        self._refresh()
        given = _digest(token)
        accepted = False
        for digest in self._digests:
            accepted |= hmac.compare_digest(digest, given)
        return accepted

    def problem(self, metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
        """Return what is wrong with a call's credentials, or None if they are valid."""
        given = [value for key, value in metadata if key == "authorization"]
        if not given:
            return "this server needs a bearer token: send the metadata authorization: Bearer TOKEN"
        scheme, _, token = str(given[0]).partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer" or not token:
            return "the metadata authorization must be one value of the form: Bearer TOKEN"
        if not self.accepts(token):
            return "this server does not accept the bearer token"
        return None

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < CHECK_S:
            return
        self._checked = now
        stamp = files.stamp(self._path)
        if stamp == self._stamp:
            return
        # The stamp is taken before the read, so a change during the read causes another read.
        self._stamp = stamp
        try:
            self._digests = _read(self._path, self._flag)
        except InvalidArgument as error:
            log.error("token file not taken, earlier tokens stay", reason=str(error))  # noqa: TRY400
        else:
            log.info("token file read again", file=str(self._path), tokens=len(self._digests))


class BearerAuth(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls without a valid token with UNAUTHENTICATED; health needs no token."""

    def __init__(self, tokens: TokenFile, metrics: Metrics) -> None:
        self._tokens = tokens
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler":
        """Pass the call on, or replace its handler by a refusal."""
        if handler_call_details.method.startswith(_HEALTH):
            return await continuation(handler_call_details)
        problem = self._tokens.problem(handler_call_details.invocation_metadata)
        if problem is None:
            return await continuation(handler_call_details)
        return self._refusal(handler_call_details.method, problem)

    def _refusal(self, method: str, problem: str) -> "Handler":
        async def refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            # The client's own id is in the message, which is not read.
            request_id = uuid.uuid4().hex
            log.info(
                "call refused",
                request_id=request_id,
                method=method,
                peer=context.peer(),
                reason=problem,
            )
            status = to_wire(Unauthenticated(problem), request_id)
            self._metrics.answered(method.rpartition("/")[2], status.code.name, 0.0)
            await context.abort(status.code, status.details, status.trailers)

        # Streaming in both directions, so that it can refuse any call without reading a message.
        handler: Handler = grpc.stream_stream_rpc_method_handler(refuse)
        return handler


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _read(path: Path, flag: str) -> tuple[bytes, ...]:
    content = files.read(path, flag).decode("utf-8", "replace")
    digests = []
    for number, line in enumerate(content.splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if _TOKEN.fullmatch(token) is None:
            raise InvalidArgument(
                flag,
                f"{path}, line {number}: not a token; accepted: {MIN_TOKEN_CHARACTERS} or more "
                "printable ASCII characters without spaces",
            )
        digests.append(_digest(token))
    if not digests:
        raise InvalidArgument(flag, f"{path} holds no token; give one token per line")
    return tuple(digests)
