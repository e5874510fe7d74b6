"""The command line: `python -m service.ray_serve` runs replicas under Ray on this machine.

Owns starting a private Ray, announcing, and stopping it. On an existing cluster, Serve's own
commands start the application: docs/ray.md. Knows nothing of what settings do.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from pydantic import ValidationError

from a2sf.errors import A2SFError, InvalidArgument
from a2sf.validation import first_problem
from service.config import settings
from service.ray_serve.options import RayOptions
from service.rpc.listener import check_free

PROGRAM = "python -m service.ray_serve"

OWN: dict[str, type] = {"num_replicas": int, "num_cpus": float, "num_gpus": float}
"""Settings that the plain server does not have."""

APPLICATION = "a2sf"
"""Name of the application in Serve."""

OBJECT_STORE_BYTES = 100 * 2**20
"""Size of Ray's shared memory. Calls carry little data, and do not use it."""


def serve(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit code."""
    parser = _parser()
    own, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        print("\nThe options of the server, some of which are refused here:\n")
    loaded = settings.load(rest)
    if loaded.print_config:
        print(loaded.as_toml(), end="")
        return 0
    given = loaded.options.model_dump(exclude_unset=True)
    port = given.pop("port", loaded.options.port)
    try:
        options = RayOptions(**given, **{name: getattr(own, name) for name in OWN})
    except ValidationError as error:
        raise InvalidArgument(PROGRAM, first_problem(error)) from error
    options.check(loaded.sources)
    if port == 0:
        raise InvalidArgument("--port", "0; Ray's gRPC proxy cannot pick a free port; give one")
    # Ray's processes would report a port in use much later and less clearly.
    check_free(f"0.0.0.0:{port}", "--port")
    check_free(f"127.0.0.1:{own.http_port}", "--http-port")

    # Set before Ray is imported: send no usage statistics.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Log every call's line, also if lines are alike.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Ray runs its workers at niceness 15. With other work on the machine, a proxy then starts too
    # slowly for Serve, and replicas get CPU time last.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    from service.ray_serve.application import SERVICER_FUNCTIONS, app

    # "local" in spite of RAY_ADDRESS: this Ray ends with the program.
    ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)
    try:
        serve.start(
            # Serve has no gRPC without HTTP; the application does not use HTTP.
            http_options=HTTPOptions(host="127.0.0.1", port=own.http_port),
            grpc_options=gRPCOptions(port=port, grpc_servicer_functions=SERVICER_FUNCTIONS),
        )
        try:
            serve.run(app(options), name=APPLICATION)
        except RuntimeError as error:
            # The cause is in the replica's log lines, which Ray has printed by now.
            print(f"error: {error} See the replicas' log lines above.", file=sys.stderr)
            return 1
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        print(f"serving {options.model} on port {port}", flush=True)
        stopping.wait()
        print("stopping", flush=True)
        serve.delete(APPLICATION)
    finally:
        ray.shutdown()
    return 0


def main() -> None:
    """Run the command line and exit."""
    try:
        code = serve(sys.argv[1:])
    except A2SFError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArgument("command line", f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM, usage=f"{PROGRAM} [OPTION ...]", add_help=False, allow_abbrev=False
    )
    for name, kind in OWN.items():
        field = RayOptions.model_fields[name]
        parser.add_argument(
            settings.flag(name),
            type=kind,
            default=field.default,
            metavar="N",
            help=field.description,
        )
    parser.add_argument(
        "--http-port",
        type=int,
        default=8000,
        metavar="N",
        help="Port on 127.0.0.1 of Serve's HTTP proxy, which this application does not use.",
    )
    return parser


if __name__ == "__main__":
    main()
