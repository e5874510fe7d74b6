"""The settings of the server, with the help text of each.

Owns names, types, defaults and help. Each group is a class; its docstring is the heading in the
help, and each field's docstring is the field's help. Settings of the engine take their defaults
and help from `a2sf.engine.config`. Knows nothing of how settings depend on each
other (`service.config.options`), or of where values come from (`service.config.settings`).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from a2sf.engine.config import EngineConfig, Kernels
from a2sf.model.locate import REFERENCE
from a2sf.schema import Count, Frozen, NotNegative, Positive

MAX_UNREAD = 4096
"""The most events of one stream that wait for its reader.

That is over a minute of tokens at 50 per second. They take 2.5 MB, or 50 MB with 20 logprobs each.
"""

Port = Annotated[int, Field(ge=0, le=65535)]


class _Group(Frozen):
    # The name of a duration has its unit in code, and no unit for users: `--grace 30`.
    model_config = ConfigDict(
        validate_by_name=True, validate_by_alias=True, use_attribute_docstrings=True
    )


def _of_engine(name: str) -> Any:
    """Return a field with the default and the help of the engine's field of this name."""
    field = EngineConfig.model_fields[name]
    return Field(default=field.default, description=field.description)


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
    kernels: Kernels = _of_engine("kernels")
    cuda_graphs: bool = _of_engine("cuda_graphs")


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

    max_batch: Positive = _of_engine("max_batch")
    slots: Positive = _of_engine("slots")
    default_budget: Positive | None = None
    """Budget of requests that name none, in tokens; without it, the slots of the narrowest head. A
    sequence that fits into the budget is exact."""
    min_budget: Count | None = None
    """Lower bound, in tokens, of a budget given as a ratio, by a request or by a table. A shorter
    request keeps all of its tokens. 0: no lower bound; without it 128, a quarter of the slots, or
    the slots of the narrowest head, whichever is the least."""
    max_prefill_tokens: Positive | None = _of_engine("max_prefill_tokens")
    step_tokens: Positive = _of_engine("step_tokens")
    max_waiting: Count = _of_engine("max_waiting")
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


class ObservabilityOptions(_Group):
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
    ObservabilityOptions,
)
"""In the order of the help."""
