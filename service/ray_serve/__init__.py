"""The service as an application of Ray Serve: replicas of the engine behind Ray's gRPC proxy.

Owns what Ray needs to be told. What requests mean, who is let in and how calls fail is the
service's own: `replica` calls the same servicers as the server does, `proxy` is what Ray's proxy
loads, `application` builds the deployment, `python -m service.ray_serve` starts it all on one
machine. Nothing else of the service knows of Ray.
"""

from a2sf.threads import wait_passively

# Ray imports a replica's module in a process of its own, which has no `main`.
wait_passively()
