"""The gRPC service: streams completions of the engine over `a2sf.inference.v1`.

Only this package imports grpc. It uses the core `a2sf`, and never imports the tuner.
"""
