"""All settings of the server together.

Owns the checks of settings that depend on each other, the addresses, and the sizes of the engine:
all that needs no model and no file. Knows nothing of where values come from
(`service.config.settings`) or of handlers.
"""

import ipaddress
from itertools import chain
from typing import Self

from pydantic import ValidationError, model_validator

from a2sf.engine.config import EngineConfig
from a2sf.errors import InvalidArgument
from a2sf.policy import DEFAULT_METHOD, DEFAULT_SINKS, Heads
from a2sf.validation import first_problem
from service.config.groups import (
    AdminOptions,
    CapacityOptions,
    ListeningOptions,
    ModelOptions,
    ObservabilityOptions,
    SecurityOptions,
    ShutdownOptions,
    TableOptions,
)

MIN_BUDGET = 128
"""With fewer slots, short requests under a ratio lose too much quality. See
benchmarks/FINDINGS.md, "How few slots a ratio may come to"."""


class ServerOptions(
    ObservabilityOptions,
    ShutdownOptions,
    AdminOptions,
    SecurityOptions,
    ListeningOptions,
    CapacityOptions,
    TableOptions,
    ModelOptions,
):
    """All settings of `serve`. The fields of the last base come first."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidArgument(
                "--tls-cert", "needs --tls-key, and --tls-key needs it; give both"
            )
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InvalidArgument("--tls-client-ca", "needs --tls-cert and --tls-key")
        if self.admin_port is not None and self.admin_token_file is None:
            raise InvalidArgument("--admin-port", "needs --admin-token-file")
        if self.admin_token_file is not None and self.admin_port is None:
            raise InvalidArgument("--admin-token-file", "needs --admin-port")
        return self

    @property
    def address(self) -> str:
        """Address to listen on. Raises InvalidArgument for plain text that others can reach."""
        return self._checked_address(
            "--host", self.host, self.port, plain_text=self.tls_cert is None
        )

    @property
    def admin_address(self) -> str:
        """Address of the admin service, which must be enabled; raises as `address`."""
        assert self.admin_port is not None
        return self._checked_address(
            "--admin-host", self.admin_host, self.admin_port, plain_text=self.tls_cert is None
        )

    @property
    def metrics_address(self) -> str:
        """Address of the metrics, which must be enabled. Always plain text; raises as `address`."""
        assert self.metrics_port is not None
        return self._checked_address(
            "--metrics-host", self.metrics_host, self.metrics_port, plain_text=True
        )

    def _checked_address(self, field: str, host: str, port: int, *, plain_text: bool) -> str:
        if plain_text and not self.insecure_bind and not is_loopback(host):
            encrypt = "" if field == "--metrics-host" else "give --tls-cert and --tls-key, "
            raise InvalidArgument(
                field,
                f"{host} can be reached from other machines, in plain text; bind 127.0.0.1, "
                f"{encrypt}or give --insecure-bind if the network is trusted",
            )
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def default_budget_for(self, row: Heads | None) -> int:
        """Default budget of a request; `row`: the slots of a row's heads (None: equal heads)."""
        if self.default_budget is not None:
            return self.default_budget
        return self._narrowest(row)

    def min_budget_for(self, row: Heads | None) -> int:
        """Lower bound of a ratio if request and table set none; `row` as in default_budget_for."""
        if self.min_budget is not None:
            return self.min_budget
        # A quarter, so that a table that gives some heads four times the mean fits too. A request
        # whose length equals the floor needs that many slots in every head.
        return min(MIN_BUDGET, self.slots // 4, self._narrowest(row))

    def _narrowest(self, row: Heads | None) -> int:
        return min(chain(*row)) if row else self.slots

    def engine_config(self, row: Heads | None) -> EngineConfig:
        """The engine's sizes. `row`: the slots of a row's heads, by `slots_per_head`; None: equal.

        Raises InvalidArgument if sizes contradict each other.
        """
        least = DEFAULT_SINKS + 1
        budget = self.default_budget_for(row)
        if self.slots < least:
            raise InvalidArgument(
                "--slots", f"{self.slots}; accepted: {least} (sinks and the newest token) or more"
            )
        if not least <= budget <= self.slots:
            raise InvalidArgument(
                "--default-budget",
                f"{budget}; accepted: {least} (sinks and the newest token) to {self.slots} (slots)",
            )
        if (floor := self.min_budget_for(row)) > self.slots:
            raise InvalidArgument(
                "--min-budget", f"{floor}; accepted: 0 (none) to {self.slots} (slots)"
            )
        try:
            return EngineConfig(
                **self.model_dump(include=set(EngineConfig.model_fields)),
                # Slots as weights: split in proportion to them, the same slots give the same row.
                head_share=row,
                default_policy=DEFAULT_METHOD.model_copy(
                    update={"budget": budget, "min_budget": floor}
                ),
            )
        except ValidationError as error:
            raise InvalidArgument("options", first_problem(error)) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a port on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
