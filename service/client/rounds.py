"""How a call that found no room looks for some: at the next server at once, then later.

Owns the number of attempts and the time between them. Knows nothing of calls or channels. Left to
gRPC, a call would wait before it asks another server: a full one says when to come back to itself.
"""

import time

import grpc

from a2sf.errors import InvalidArgument
from service.status import DeadlineExceeded, NoRoom

ROUNDS = 4
"""Times that a call looks for room, first included, as far apart as servers say."""

MAX_TIMEOUT_S = 1e9
"""Longest deadline, thirty years. gRPC counts nanoseconds: what has no room in 64 bits, infinity
included, it takes for a deadline that has passed."""

SERVERS_A_ROUND = 2
"""Servers that are asked in a round, where there are several. More would find room a little sooner,
and multiply what full servers have to refuse."""


class Rounds:
    """The attempts of one call, which ends `timeout_s` seconds after this was made."""

    def __init__(self, timeout_s: float, *, several: bool) -> None:
        """Begin now.

        Raises InvalidArgument for a time that is too long, or no number, and DeadlineExceeded where
        no time is left: gRPC lets such a call through if the server is quick.
        """
        # Written so that NaN is refused too.
        if not timeout_s <= MAX_TIMEOUT_S:
            raise InvalidArgument("timeout_s", f"{timeout_s}; accepted: at most {MAX_TIMEOUT_S:g}")
        if timeout_s <= 0:
            raise DeadlineExceeded(
                f"DEADLINE_EXCEEDED: timeout_s is {timeout_s}", grpc.StatusCode.DEADLINE_EXCEEDED
            )
        self._deadline = time.monotonic() + timeout_s
        self._servers = SERVERS_A_ROUND if several else 1
        self._refusals = 0

    @property
    def left_s(self) -> float:
        """What is left of the call's time, in seconds."""
        return max(0.0, self._deadline - time.monotonic())

    def wait_s(self, refusal: NoRoom) -> float:
        """Seconds until the next attempt. Raises `refusal` where it was the last."""
        self._refusals += 1
        if self._refusals % self._servers:
            return 0.0
        wait_s = refusal.retry_after_s
        if self._refusals == ROUNDS * self._servers or wait_s is None or wait_s >= self.left_s:
            raise refusal
        return wait_s
