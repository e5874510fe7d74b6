"""Retries a call that found no room, or no server: when, and how often.

Owns the number of attempts and the delays. Knows nothing of calls or channels. gRPC's own retries
are off: they would wait before trying another server, because a full server gives a delay only for
itself; and in grpcio 1.85 a call whose retry finds no server may never end, not even at its
deadline.
"""

import random
import time

import grpc

from a2sf.errors import InvalidArgument, Unavailable
from service.status import DeadlineExceeded, NoRoom

ROUNDS = 4
"""Rounds of attempts, including the first; servers give the delay between rounds."""

MAX_TIMEOUT_S = 1e9
"""Longest deadline, about thirty years. gRPC counts nanoseconds in 64 bits, and treats a value that
does not fit, such as infinity, as a deadline in the past."""

ATTEMPTS = 4
"""Attempts that may end as Unavailable, including the first."""

FIRST_WAIT_S = 0.2
"""Delay before the second of these attempts; each later delay is twice as long. All vary by a fifth
at random, so that the calls of a server that died do not return at the same time."""

SERVERS_A_ROUND = 2
"""Servers to try per round, if there are several. With more, a call would find room a little
sooner, but full servers would have to refuse many more calls."""


class Rounds:
    """The attempts of one call, with a deadline of `timeout_s` seconds from creation."""

    def __init__(self, timeout_s: float, *, several: bool, after_unavailable: bool) -> None:
        """Start the deadline.

        `several`: whether there are other servers to try. `after_unavailable`: whether the call may
        be repeated if it is unknown what the server did.

        Raises InvalidArgument for a timeout that is too long or NaN, and DeadlineExceeded if it is
        not positive: gRPC lets such a call succeed if the server is fast.
        """
        # The comparison is written so that it refuses NaN too.
        if not timeout_s <= MAX_TIMEOUT_S:
            raise InvalidArgument("timeout_s", f"{timeout_s}; accepted: at most {MAX_TIMEOUT_S:g}")
        if timeout_s <= 0:
            raise DeadlineExceeded(
                f"DEADLINE_EXCEEDED: timeout_s is {timeout_s}", grpc.StatusCode.DEADLINE_EXCEEDED
            )
        self._deadline = time.monotonic() + timeout_s
        self._servers = SERVERS_A_ROUND if several else 1
        self._after_unavailable = after_unavailable
        self._refusals = 0
        self._failures = 0

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._deadline - time.monotonic())

    def wait_s(self, error: NoRoom | Unavailable) -> float:
        """Seconds to wait before the next attempt. Raises `error` if there is none left."""
        if isinstance(error, NoRoom):
            self._refusals += 1
            if self._refusals % self._servers:
                return 0.0
            last, wait_s = self._refusals == ROUNDS * self._servers, error.retry_after_s
        else:
            self._failures += 1
            last = self._failures == ATTEMPTS or not self._after_unavailable
            wait_s = FIRST_WAIT_S * 2 ** (self._failures - 1) * random.uniform(0.8, 1.2)
        if last or wait_s is None or wait_s >= self.left_s:
            raise error
        return wait_s
