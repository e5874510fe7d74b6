"""The gRPC service: streams completions from the engine over `a2sf.inference.v1`.

The only package that knows grpc. It sits on top of the core `a2sf` and never imports the tuner.
"""
