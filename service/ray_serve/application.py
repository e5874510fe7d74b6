"""The Ray Serve application: `service.ray_serve.application:app`.

Owns the options of the deployment. Knows nothing of calls.
"""

from ray import serve

from service.ray_serve.options import RayOptions
from service.ray_serve.replica import Replica

NAME = "A2SF"
"""Name of the deployment; a Serve config uses it to change the deployment's options."""

SERVICER_FUNCTIONS = ["service.ray_serve.proxy.add_services"]
"""Value for `grpc_servicer_functions` in Serve's `grpc_options`."""

HEALTH_CHECK_PERIOD_S = 2.0
"""Seconds between Ray's health checks; Ray replaces a dead replica when a check notices it."""


def app(args: RayOptions) -> serve.Application:
    """Build the application. Raises InvalidArgument for settings that Ray does not support."""
    args.check()
    deployment = serve.deployment(
        name=NAME,
        num_replicas=args.num_replicas,
        # The capacity of a replica. Further requests wait in Ray for the first replica with room.
        max_ongoing_requests=args.max_batch + args.max_waiting,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        graceful_shutdown_timeout_s=args.grace_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
    )(Replica)
    return deployment.bind(args)
