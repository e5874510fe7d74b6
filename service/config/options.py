"""The settings of the server.

Owns the settings, the help text of each, and the checks that need no model and no file. Each group
is a class; its docstring is the heading in the help, and each field's docstring is the field's
help. Knows nothing of where values come from (`service.config.settings`) or of handlers.
"""

import ipaddress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from a2sf.cache.budgets import slots_for, split_slots
from a2sf.errors import InvalidArgument
from a2sf.model.locate import REFERENCE
from a2sf.policy import DEFAULT_METHOD, DEFAULT_SINKS, Heads
from a2sf.schema import Count, Frozen, NotNegative, Positive
from a2sf.validation import first_problem

if TYPE_CHECKING:
    from a2sf.engine.admission import EngineConfig

MIN_BUDGET = 128
"""With fewer slots, short requests under a ratio lose too much quality. See
benchmarks/FINDINGS.md, "How few slots a ratio may come to"."""

MAX_UNREAD = 4096
"""The most events of one stream that wait for its reader.

That is over a minute of tokens at 50 per second. They take 2.5 MB, or 50 MB with 20 logprobs each.
"""

Shares = tuple[tuple[float, ...], ...]
"""One weight per layer and KV head. Slots are split among heads in proportion to the weights."""

Port = Annotated[int, Field(ge=0, le=65535)]


class _Group(Frozen):
    # The name of a duration has its unit in code, and no unit for users: `--grace 30`.
    model_config = ConfigDict(
        validate_by_name=True, validate_by_alias=True, use_attribute_docstrings=True
    )


class ModelOptions(_Group):
    """Model"""

    model: str = REFERENCE
    """`reference`, a directory, a GGUF file, or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """auto, float64, float32, bfloat16 or float16. On a GPU, auto is the dtype of the stored
    weights. On a CPU, auto is bfloat16 if the CPU multiplies it in hardware and it was measured to
    be faster, else float32."""
    chat_template: str | None = None
    """Name of the model's chat template to use; without it, the only one or the one named
    default."""
    threads: Positive | None = None
    """CPU threads for computation; without it, as many as the process may use."""
    kernels: Literal["auto", "torch", "triton", "numba"] = "auto"
    """Implementation of eviction: torch operations, Triton kernels on a GPU, or numba kernels on a
    CPU. auto picks Triton or numba if it supports the device, the dtype and the head size, else
    torch."""
    cuda_graphs: bool = True
    """Run the Triton kernels in CUDA graphs, captured at startup. Not used when several processes
    share the model."""


class TableOptions(_Group):
    """Alpha tables"""

    tables: Path | None = None
    """Directory of alpha tables (*.json); without it, the tables that ship with the reference
    model, if that model is served."""
    default_table: str | None = None
    """Alpha table for requests that name no method; without it, they use alpha 0.98 in all heads
    and protect a share of 0.5. If the table splits slots unequally among heads, every row has that
    split."""
    watch_tables: bool = True
    """Read the directory of tables again when it changes."""


class CapacityOptions(_Group):
    """Capacity"""

    max_batch: Positive = 8
    """Requests that decode together."""
    slots: Positive = 1024
    """Slots per head of a row, averaged over heads. This is the largest budget of a request, in
    tokens. If the default table splits slots unequally, a request with an equal budget in every
    head can have at most the slots of the narrowest head."""
    default_budget: Positive | None = None
    """Budget of requests that name none, in tokens; without it, the slots of the narrowest head. A
    sequence that fits into the budget is exact."""
    min_budget: Count | None = None
    """Lower bound, in tokens, of a budget given as a ratio, by a request or by a table. A shorter
    request keeps all of its tokens. 0: no lower bound; without it 128, a quarter of the slots, or
    the slots of the narrowest head, whichever is the least."""
    max_prefill_tokens: Positive | None = None
    """Longest prompt block, in tokens; without it, the model's context, but at most 8192."""
    step_tokens: Positive = 512
    """Prompt tokens computed between two decode steps."""
    max_waiting: Count = 64
    """Requests that may wait for a row; the server refuses any more."""
    max_message_bytes: Positive = 4 * 2**20
    """Largest request message that the server reads, in bytes."""
    max_prompt_bytes: Positive = 2**20
    """Longest prompt that the server tokenizes, in bytes of UTF-8."""
    max_unread: Positive = MAX_UNREAD
    """Events of one request that may wait for its client; one more, and the request is aborted."""
    stall_timeout_s: Annotated[
        float, Field(gt=0.0, allow_inf_nan=False, validation_alias="stall_timeout")
    ] = 30.0
    """Seconds within which a client must accept an event; after that, its request is aborted."""


class ListeningOptions(_Group):
    """Listening"""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 50051
    """Port to listen on; 0 picks a free one."""
    port_file: Path | None = None
    """File that contains the port while the server serves."""
    insecure_bind: bool = False
    """Allow plain text on addresses other than loopback, for a trusted network."""


class SecurityOptions(_Group):
    """Security"""

    token_file: Path | None = None
    """File of bearer tokens for the inference port, one per line. Read again when it changes.
    Without it, calls need no token."""
    tls_cert: Path | None = None
    """Certificate chain (PEM) of all gRPC ports. Read again when it changes. Without it, plain
    text."""
    tls_key: Path | None = None
    """Private key (PEM) of the certificate."""
    tls_client_ca: Path | None = None
    """CA certificate (PEM) that must have signed the certificate of every client; without it,
    clients need no certificate."""


class AdminOptions(_Group):
    """Administration"""

    admin_port: Port | None = None
    """Port of the admin service; 0 picks a free one; without it, there is no admin service."""
    admin_host: str = "127.0.0.1"
    """Address that the admin service listens on."""
    admin_token_file: Path | None = None
    """File of bearer tokens for the admin port; required with --admin-port. Tokens of the
    inference port do not open it."""


class ShutdownOptions(_Group):
    """Shutdown"""

    settle_s: Annotated[NotNegative, Field(validation_alias="settle")] = 0.0
    """Seconds between reporting NOT_SERVING and refusing new calls, so that load balancers can move
    to other servers."""
    grace_s: Annotated[NotNegative, Field(validation_alias="grace")] = 30.0
    """Seconds that running requests then get to finish."""


class SightOptions(_Group):
    """Logs, metrics and traces"""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of log lines on stderr."""
    log_format: Literal["text", "json"] = "text"
    """text: lines for reading; json: one JSON object per line."""
    log_prompts: bool = False
    """Log prompts and completions, at level info."""
    metrics_port: Port | None = None
    """Port of the Prometheus metrics over HTTP; 0 picks a free one; without it, no metrics."""
    metrics_host: str = "127.0.0.1"
    """Address that the metrics server listens on."""
    traces: bool = False
    """Send OpenTelemetry traces, configured by the standard OTEL_* environment variables."""


GROUPS: tuple[type[_Group], ...] = (
    ModelOptions,
    TableOptions,
    CapacityOptions,
    ListeningOptions,
    SecurityOptions,
    AdminOptions,
    ShutdownOptions,
    SightOptions,
)
"""In the order of the help."""


class ServerOptions(
    SightOptions,
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
    def _whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidArgument("--tls-cert", "it and --tls-key need each other; give both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InvalidArgument("--tls-client-ca", "needs --tls-cert and --tls-key")
        if self.admin_port is not None and self.admin_token_file is None:
            raise InvalidArgument("--admin-port", "needs --admin-token-file")
        if self.admin_token_file is not None and self.admin_port is None:
            raise InvalidArgument("--admin-token-file", "opens nothing without --admin-port")
        return self

    @property
    def address(self) -> str:
        """Address to listen on. Raises InvalidArgument for plain text that others can reach."""
        return self._reachable("--host", self.host, self.port, plain_text=self.tls_cert is None)

    @property
    def admin_address(self) -> str:
        """Address of the admin service, which must be enabled; raises as `address`."""
        assert self.admin_port is not None
        return self._reachable(
            "--admin-host", self.admin_host, self.admin_port, plain_text=self.tls_cert is None
        )

    @property
    def metrics_address(self) -> str:
        """Address of the metrics, which must be enabled. Always plain text; raises as `address`."""
        assert self.metrics_port is not None
        return self._reachable(
            "--metrics-host", self.metrics_host, self.metrics_port, plain_text=True
        )

    def _reachable(self, field: str, host: str, port: int, *, plain_text: bool) -> str:
        if plain_text and not self.insecure_bind and not is_loopback(host):
            encrypt = "" if field == "--metrics-host" else "give --tls-cert and --tls-key, "
            raise InvalidArgument(
                field,
                f"{host} can be reached from outside, and this server speaks plain text there; "
                f"bind 127.0.0.1, {encrypt}or say --insecure-bind where the network itself is "
                "trusted",
            )
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def budget(self, head_share: Shares | None) -> int:
        """Default budget of a request, if rows have these shares (None: equal heads)."""
        if self.default_budget is not None:
            return self.default_budget
        return self._narrowest(head_share)

    def floor(self, head_share: Shares | None) -> int:
        """Lower bound of a ratio if request and table set none; shares as in `budget`."""
        if self.min_budget is not None:
            return self.min_budget
        # A quarter, so that a table that gives some heads four times the mean fits too. A request
        # whose length equals the floor needs that many slots in every head.
        return min(MIN_BUDGET, self.slots // 4, self._narrowest(head_share))

    def _narrowest(self, head_share: Shares | None) -> int:
        return min(chain(*heads_of(self.slots, head_share or ((1.0,),))))

    def engine_config(self, head_share: Shares | None) -> "EngineConfig":
        """The engine's sizes. `head_share`: the shares of a row's heads; None: equal heads.

        Raises InvalidArgument if sizes contradict each other.
        """
        # Imported here because it loads torch; help and flag errors must not wait for that.
        from a2sf.engine.admission import EngineConfig

        least = DEFAULT_SINKS + 1
        budget = self.budget(head_share)
        if self.default_budget is None and budget < least:
            raise InvalidArgument(
                "--slots",
                f"{self.slots}, of which the narrowest head gets {budget}; accepted: "
                f"{slots_for(least, head_share or ((1.0,),))} or more",
            )
        if not least <= budget <= self.slots:
            raise InvalidArgument(
                "--default-budget",
                f"{budget}; accepted: {least} (sinks and the newest token) to {self.slots} (slots)",
            )
        if (floor := self.floor(head_share)) > self.slots:
            raise InvalidArgument(
                "--min-budget", f"{floor}; accepted: 0 (none) to {self.slots} (slots)"
            )
        try:
            return EngineConfig(
                slots=self.slots,
                head_share=head_share,
                max_batch=self.max_batch,
                max_prefill_tokens=self.max_prefill_tokens,
                step_tokens=self.step_tokens,
                max_waiting=self.max_waiting,
                kernels=self.kernels,
                cuda_graphs=self.cuda_graphs,
                default_policy=DEFAULT_METHOD.model_copy(
                    update={"budget": budget, "min_budget": floor}
                ),
            )
        except ValidationError as error:
            raise InvalidArgument("options", first_problem(error)) from error


def heads_of(slots: int, shares: Shares) -> Heads:
    """Return the slots of each layer and head of a row with `slots`, split by `shares`."""
    return split_slots(slots, shares, slots * sum(map(len, shares)))


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a port on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
