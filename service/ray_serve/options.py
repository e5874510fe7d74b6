"""The application's settings: the server's settings and a few for Ray.

Owns which of the server's settings have no meaning under Ray, and why. Knows nothing of how they
are used.
"""

from collections.abc import Mapping
from types import MappingProxyType

from pydantic import ConfigDict

from a2sf.errors import InvalidArgument
from a2sf.schema import NotNegative, Positive
from service.config.options import ServerOptions
from service.config.settings import NAMES, flag

_PLAIN = "Ray's gRPC proxy uses plain text; end TLS in a proxy in front of it"
_ANY_REPLICA = "an admin call would reach one replica, not all"
_EVERYWHERE = "Ray's gRPC proxy listens on every address of its node"
_READS = "Ray's proxy reads ahead for the client, and these settings do not reach it"
_METRICS = "Ray exports the metrics of its deployments itself"

REFUSED: Mapping[str, str] = {
    "max_message_bytes": "Ray's gRPC proxy reads messages up to 2 GiB; --max-prompt-bytes applies",
    "max_unread": _READS,
    "stall_timeout_s": _READS,
    "host": _EVERYWHERE,
    "port": "Serve owns the port: give grpc_options.port in its config, or serve start --grpc-port",
    "port_file": "Serve owns the port, and its config gives it",
    "tls_cert": _PLAIN,
    "tls_key": _PLAIN,
    "tls_client_ca": _PLAIN,
    "admin_port": _ANY_REPLICA,
    "admin_host": _ANY_REPLICA,
    "admin_token_file": _ANY_REPLICA,
    "settle_s": "Ray sends no calls to a replica that it is about to end",
    "metrics_port": _METRICS,
    "metrics_host": _METRICS,
}
"""Settings that are refused if given, with the reason."""


class RayOptions(ServerOptions):
    """The server's settings and those of the deployment, in the form of Ray's application builders.

    Values may be text, because `serve run` passes every value as text.
    """

    model_config = ConfigDict(strict=False)

    num_replicas: Positive = 1
    """Number of replicas, each with a separate engine."""
    num_cpus: NotNegative = 1.0
    """CPUs that Ray reserves for each replica."""
    num_gpus: NotNegative = 0.0
    """GPUs that Ray reserves for each replica; the replica sees only these. With 0, Ray hides no
    GPU."""

    def check(self, sources: Mapping[str, str] = MappingProxyType({})) -> None:
        """Raise InvalidArgument, with the flag, for a setting that Ray does not support.

        `sources` maps settings' names to the sources of their values, as far as known.
        """
        for field, why in REFUSED.items():
            if field in self.model_fields_set:
                name = flag(NAMES[field])
                source = sources.get(NAMES[field], name)
                came = "" if source == name else f" (from {source})"
                raise InvalidArgument(name, f"not accepted under Ray Serve{came}: {why}")
        if not self.insecure_bind:
            raise InvalidArgument(
                "--insecure-bind",
                "needed under Ray Serve: its gRPC proxy listens on every address of its node, in "
                "plain text; give it if the network is trusted",
            )
