"""The application as Ray Serve takes it: `service.ray_serve.application:app`.

Owns what the deployment says of itself to Ray. Knows nothing of calls.
"""

from ray import serve

from service.ray_serve.options import RayOptions
from service.ray_serve.replica import Replica

NAME = "A2SF"
"""The deployment's name, by which a Serve config changes its options."""

SERVICER_FUNCTIONS = ["service.ray_serve.proxy.add_services"]
"""What Serve's `grpc_options` must name as `grpc_servicer_functions`."""

HEALTH_CHECK_PERIOD_S = 2.0
"""How often Ray looks after a replica: one that is gone is replaced when that is seen."""


def app(args: RayOptions) -> serve.Application:
    """Build the application. Raises InvalidArgument for settings that cannot be under Ray."""
    args.check()
    deployment = serve.deployment(
        name=NAME,
        num_replicas=args.num_replicas,
        # What a replica can hold. The rest waits with Ray, for whichever has room first.
        max_ongoing_requests=args.max_batch + args.max_waiting,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        graceful_shutdown_timeout_s=args.grace_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
    )(Replica)
    return deployment.bind(args)
