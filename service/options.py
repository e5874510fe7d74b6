"""What the server is started with.

Owns the settings, what each means, and their checks that need no model and no file. Each group is
a class whose docstring heads it in the help; each setting's docstring is its help. Knows nothing
of where values come from (`service.settings`) or of handlers.
"""

import ipaddress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from a2sf.errors import InvalidArgument
from a2sf.files import REFERENCE
from a2sf.policy import DEFAULT_METHOD, DEFAULT_SINKS, Heads, deal, slots_for
from a2sf.schema import Count, Frozen, NotNegative, Positive, first_problem
from service.runner import MAX_UNREAD

if TYPE_CHECKING:
    from a2sf.admission import EngineConfig

MIN_BUDGET = 128
"""Slots below which short requests lose too much by a ratio, by benchmarks/FINDINGS.md, "How few
slots a ratio may come to"."""

Shares = tuple[tuple[float, ...], ...]
"""A weight of each layer and KV head, by which slots are dealt."""

Port = Annotated[int, Field(ge=0, le=65535)]


class _Group(Frozen):
    # A duration's name has its unit in code, and no unit where people write it: `--grace 30`.
    model_config = ConfigDict(
        validate_by_name=True, validate_by_alias=True, use_attribute_docstrings=True
    )


class ModelOptions(_Group):
    """Model"""

    model: str = REFERENCE
    """`reference`, a directory, a GGUF file, or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """auto, float64, float32, bfloat16 or float16. On a GPU auto is as the weights are stored; on a
    processor it is bfloat16 where that is multiplied in hardware and measured to be faster, else
    float32."""
    chat_template: str | None = None
    """Which of the model's chat templates to use, by name; without it, its only one or the one
    named default."""
    threads: Positive | None = None
    """Threads of a processor's computations; without it, as many as the process may use."""
    kernels: Literal["auto", "torch", "triton", "numba"] = "auto"
    """What carries out eviction: torch's operations, Triton's programs on a GPU, or numba's on a
    processor; auto takes the programs where they serve the device, the dtype and the head size."""
    cuda_graphs: bool = True
    """Run Triton's programs in CUDA graphs, which are captured at the start; not where several
    processes share the model."""


class TableOptions(_Group):
    """Alpha tables"""

    tables: Path | None = None
    """Directory of alpha tables (*.json); without it, those that ship with the reference model
    where that is served."""
    default_table: str | None = None
    """Table of requests that name no method; without it, they forget by alpha 0.98 in all heads and
    protect a share of 0.5. Where it deals slots unequally among heads, so do all rows."""
    watch_tables: bool = True
    """Read the tables' directory again when it changes."""


class CapacityOptions(_Group):
    """Capacity"""

    max_batch: Positive = 8
    """Requests that decode together."""
    slots: Positive = 1024
    """Slots of a row, the mean over heads: the largest budget of a request, in tokens. Where the
    default table deals them unequally, requests with the same in every head get at most those of
    the narrowest."""
    default_budget: Positive | None = None
    """Budget of requests that name none, in tokens; without it, the slots of the narrowest head:
    what fits into them is exact."""
    min_budget: Count | None = None
    """The fewest tokens that a budget ratio comes to, a request's or a table's; a request that
    needs fewer keeps all of them. 0: no floor; without it 128, a quarter of the slots, or those of
    the narrowest head, whichever is the least."""
    max_prefill_tokens: Positive | None = None
    """Longest prompt block, in tokens; without it, the model's context, at most 8192."""
    step_tokens: Positive = 512
    """Prompt tokens computed between two decode steps."""
    max_waiting: Count = 64
    """Requests that may wait for a row; further ones are refused."""
    max_message_bytes: Positive = 4 * 2**20
    """Largest request message that is read."""
    max_prompt_bytes: Positive = 2**20
    """Longest prompt that is tokenized, in bytes of UTF-8."""
    max_unread: Positive = MAX_UNREAD
    """Events of one request that may wait for its client to read; beyond, the request is
    aborted."""
    stall_timeout_s: Annotated[
        float, Field(gt=0.0, allow_inf_nan=False, validation_alias="stall_timeout")
    ] = 30.0
    """Seconds in which a client must take an event before its request is aborted."""


class ListeningOptions(_Group):
    """Listening"""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 50051
    """Port to listen on; 0 picks a free one."""
    port_file: Path | None = None
    """File that holds the port while the server serves."""
    insecure_bind: bool = False
    """Allow plain text beyond this machine, where the network itself is trusted."""


class SecurityOptions(_Group):
    """Security"""

    token_file: Path | None = None
    """Bearer tokens that open the inference port, one a line, read again when the file changes;
    without it, calls need none."""
    tls_cert: Path | None = None
    """Certificate chain (PEM) of every port with gRPC, read again when the file changes; without
    it, plain text."""
    tls_key: Path | None = None
    """Private key (PEM) of the certificate."""
    tls_client_ca: Path | None = None
    """Authority (PEM) that must have signed every client's certificate; without it, clients need
    none."""


class AdminOptions(_Group):
    """Administration"""

    admin_port: Port | None = None
    """Port of the admin service; 0 picks a free one; without it, there is none."""
    admin_host: str = "127.0.0.1"
    """Address of the admin service."""
    admin_token_file: Path | None = None
    """Bearer tokens that open the admin port; needed with it. Those of the inference port do
    not."""


class ShutdownOptions(_Group):
    """Shutdown"""

    settle_s: Annotated[NotNegative, Field(validation_alias="settle")] = 0.0
    """Seconds between telling NOT_SERVING and refusing new calls, in which load balancers look
    elsewhere."""
    grace_s: Annotated[NotNegative, Field(validation_alias="grace")] = 30.0
    """Seconds that running requests then get to finish."""


class SightOptions(_Group):
    """Logs, metrics and traces"""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged, to stderr."""
    log_format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line."""
    log_prompts: bool = False
    """Log prompts and completions, at level info."""
    metrics_port: Port | None = None
    """Port of Prometheus metrics over HTTP; 0 picks a free one; without it, there are none."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics."""
    traces: bool = False
    """Send OpenTelemetry traces, as the standard OTEL_* environment variables say."""


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
    """Everything that `serve` can be told. The bases' last fields come first."""

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
        """Where to listen. Raises InvalidArgument for what must not be listened on."""
        return self._reachable("--host", self.host, self.port, plain_text=self.tls_cert is None)

    @property
    def admin_address(self) -> str:
        """The same of the admin service, where there is one."""
        assert self.admin_port is not None
        return self._reachable(
            "--admin-host", self.admin_host, self.admin_port, plain_text=self.tls_cert is None
        )

    @property
    def metrics_address(self) -> str:
        """The same of the metrics, where there are any; they are always plain text."""
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
        """What a request gets without asking, where rows have these shares (None: equal heads)."""
        if self.default_budget is not None:
            return self.default_budget
        return self._narrowest(head_share)

    def floor(self, head_share: Shares | None) -> int:
        """What no ratio goes below where neither request nor table says, with the same shares."""
        if self.min_budget is not None:
            return self.min_budget
        # A quarter, so that a table which deals some heads four times the mean fits as well; and a
        # request that is just as long as the floor needs it in every head.
        return min(MIN_BUDGET, self.slots // 4, self._narrowest(head_share))

    def _narrowest(self, head_share: Shares | None) -> int:
        return min(chain(*heads_of(self.slots, head_share or ((1.0,),))))

    def engine_config(self, head_share: Shares | None) -> "EngineConfig":
        """The engine's sizes, with rows of equal heads or (not None) of these shares.

        Raises InvalidArgument where sizes contradict each other.
        """
        # Here, because it brings torch: help and refusals of flags need not wait for that.
        from a2sf.admission import EngineConfig

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
    """Return the slots of each layer and head of a row of `slots`, dealt by `shares`."""
    return deal(slots, shares, slots * sum(map(len, shares)))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
