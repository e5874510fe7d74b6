"""The service as a Ray Serve application: replicas of the engine behind Ray's gRPC proxy.

Owns the integration with Ray. Requests, authentication and errors are handled by the rest of the
service: `replica` calls the same servicers as the server does, `proxy` is loaded by Ray's proxy,
`application` builds the deployment, and `python -m service.ray_serve` starts all of it on one
machine. No other module of the service knows Ray.
"""

from a2sf.threads import wait_passively

# Ray imports a replica's module in a separate process, which has no `main`.
wait_passively()
