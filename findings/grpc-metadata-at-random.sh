#!/usr/bin/env bash
# Assumed: gRPC takes a call's metadata up to a limit, and refuses what is larger.
# Happens: between 8 and 16 KiB it refuses calls at random, as RESOURCE_EXHAUSTED, which looks like a
#   server without room. With grpc.max_metadata_size and grpc.absolute_max_metadata_size alike there
#   is one limit.
# Versions: grpcio 1.85.1. Date: 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet grpcio==1.85.1
"$work/venv/bin/python" - <<'PYTHON'
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

CALLS, BYTES, LIMIT = 60, 12_000, 16 * 2**10
ALIKE = [("grpc.max_metadata_size", LIMIT), ("grpc.absolute_max_metadata_size", LIMIT)]


def refused(options):
    """Calls of equal metadata that are refused, and the last refusal's words."""
    server = grpc.server(ThreadPoolExecutor(1), options=options)
    echo = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("s", {"Echo": echo})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    count, words = 0, ""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/s/Echo")
        for _ in range(CALLS):
            try:
                call(b"x", metadata=[("x-large", "m" * BYTES)], timeout=30)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
                count, words = count + 1, error.details().split(";")[0]
    server.stop(None)
    return count, words


by_default, words = refused([])
alike, _ = refused(ALIKE)
print(f"grpcio {grpc.__version__}, metadata of {BYTES} bytes, {CALLS} equal calls")
print(f"by default: {by_default} refused ({words}); with equal limits: {alike} refused")
sys.exit(0 if 0 < by_default < CALLS and alike == 0 else 1)
PYTHON
