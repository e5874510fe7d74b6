"""What the server is started with.

Owns the settings and their checks that need no model. Knows nothing of the command line or of
handlers.
"""

import ipaddress
from pathlib import Path

from pydantic import ValidationError

from a2sf.admission import EngineConfig
from a2sf.errors import InvalidArgument
from a2sf.files import REFERENCE
from a2sf.policy import DEFAULT_SINKS, CachePolicy, deal, slots_for
from a2sf.schema import Count, Frozen, Positive, first_problem

MAX_PORT = 65535

DEFAULT_BUDGET = 256


class ServerOptions(Frozen):
    """Everything that `serve` can be told."""

    model: str = REFERENCE
    """`reference`, a directory, or a hub id."""
    revision: str | None = None
    tables: Path | None = None
    """Directory of alpha tables; None: those that ship with the reference model, for that model."""
    default_table: str | None = None
    """Table of requests that name no method; None: preset h2o."""
    host: str = "127.0.0.1"
    port: Count = 50051
    """0 lets the system choose."""
    insecure_bind: bool = False
    """Whether plain text may leave this machine."""
    max_batch: Positive = 8
    slots: Positive = 1024
    default_budget: Positive | None = None
    """None: DEFAULT_BUDGET, or what the narrowest layer of a row has where that is less."""
    max_prefill_tokens: Positive | None = None
    step_tokens: Positive = 512
    max_waiting: Count = 64
    threads: Positive | None = None
    """Threads of a processor's computations; None: the processors that the process may use."""
    device: str = "auto"
    dtype: str = "auto"
    port_file: Path | None = None
    grace_s: float = 30.0
    """Seconds that running requests get to finish once the server is told to stop."""

    @property
    def address(self) -> str:
        """Where to listen. Raises InvalidArgument for what must not be listened on."""
        if self.port > MAX_PORT:
            raise InvalidArgument("port", f"{self.port}; accepted: 0 to {MAX_PORT}")
        if not self.insecure_bind and not _is_loopback(self.host):
            raise InvalidArgument(
                "host",
                f"{self.host} can be reached from outside, and this server speaks plain text "
                "without authentication; bind 127.0.0.1, or say --insecure-bind where the "
                "network itself is trusted",
            )
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def budget(self, layer_share: tuple[float, ...] | None) -> int:
        """What a request gets without asking, where rows have these shares (None: equal layers)."""
        if self.default_budget is not None:
            return self.default_budget
        return min(DEFAULT_BUDGET, *layers_of(self.slots, layer_share or (1.0,)))

    def engine_config(self, layer_share: tuple[float, ...] | None) -> EngineConfig:
        """The engine's sizes, with rows of equal layers or (not None) of these shares.

        Raises InvalidArgument where sizes contradict each other.
        """
        least = DEFAULT_SINKS + 1
        budget = self.budget(layer_share)
        if self.default_budget is None and budget < least:
            raise InvalidArgument(
                "slots",
                f"{self.slots}, of which the narrowest layer gets {budget}; accepted: "
                f"{slots_for(least, layer_share or (1.0,))} or more",
            )
        if not least <= budget <= self.slots:
            raise InvalidArgument(
                "default-budget",
                f"{budget}; accepted: {least} (sinks and the newest token) to {self.slots} (slots)",
            )
        # A table brings a budget of its own; the server's is for requests that name another method.
        method = {"table": self.default_table} if self.default_table else {"preset": "h2o"}
        try:
            return EngineConfig(
                slots=self.slots,
                layer_share=layer_share,
                max_batch=self.max_batch,
                max_prefill_tokens=self.max_prefill_tokens,
                step_tokens=self.step_tokens,
                max_waiting=self.max_waiting,
                default_policy=CachePolicy.model_validate({**method, "budget": budget}),
            )
        except ValidationError as error:
            raise InvalidArgument("options", first_problem(error)) from error


def layers_of(slots: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Return the slots of each layer of a row of `slots`, dealt by `shares`."""
    return deal(slots, shares, slots * len(shares))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
