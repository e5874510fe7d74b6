#!/usr/bin/env bash
# Assumed: a call with timeout=float("inf"), or of three hundred years, never times out.
# Happens: it ends at once as DEADLINE_EXCEEDED, for the nanoseconds do not fit into 64 bits. What is
#   meant is timeout=None.
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

server = grpc.server(ThreadPoolExecutor(1))
echo = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("s", {"Echo": echo})])
port = server.add_insecure_port("127.0.0.1:0")
server.start()
told = {}
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    call = channel.unary_unary("/s/Echo")
    for timeout in (None, 1e9, 1e10, float("inf")):
        try:
            call(b"x", timeout=timeout)
        except grpc.RpcError as error:
            told[timeout] = error.code().name
        else:
            told[timeout] = "OK"
server.stop(None)
print(f"grpcio {grpc.__version__}: {told}")
late = "DEADLINE_EXCEEDED"
expected = {None: "OK", 1e9: "OK", 1e10: late, float("inf"): late}
sys.exit(0 if told == expected else 1)
PYTHON
