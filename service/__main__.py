"""The command line: `python -m service` serves, `python -m service plan` tells what that takes.

Owns how failures are told: one line on stderr, exit code 2 for what the user can mend. Knows
nothing of gRPC, nor what settings there are.
"""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress

import structlog

from a2sf.errors import A2SFError
from a2sf.threads import wait_passively
from service import logs, settings
from service.runner import EngineCrashed

log = structlog.get_logger(__name__)


def serve(arguments: Sequence[str]) -> int:
    """Serve a model until told to stop by SIGTERM or Ctrl-C; return the exit code."""
    loaded = settings.load(arguments)
    if loaded.print_config:
        print(loaded.as_toml(), end="")
        return 0
    wait_passively()
    # Here, because it brings torch: help and refusals of flags need not wait for that.
    from service.process import run

    logs.configure(loaded.options.log_format, loaded.options.log_level)
    for variable in loaded.misspelt:
        log.warning("environment variable is no setting", variable=variable)
    if loaded.options.log_format == "text":
        return asyncio.run(run(loaded.options, announce=_print))
    try:
        return asyncio.run(run(loaded.options, announce=_log))
    except A2SFError as error:
        log.critical("cannot serve", reason=str(error))
        return 2
    except EngineCrashed as error:
        log.critical("the engine died", reason=str(error))
        return 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; `serve` may be said or left out."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["plan"]:
            # Here, because a server has no use for it.
            from service.plan import cli

            cli.run(given[1:])
        code = serve(given[1:] if given[:1] == ["serve"] else given)
    except A2SFError as error:
        code = _fail(str(error), code=2)
    except EngineCrashed as error:
        # Ours to mend, not the user's; the cause is in the log.
        code = _fail(str(error), code=1)
    sys.exit(code)


def _print(event: str, line: str, **fields: str) -> None:
    # Whoever read the lines may have left; the server goes on.
    with suppress(BrokenPipeError):
        print(line, flush=True)


def _log(event: str, line: str, **fields: str) -> None:
    # A collector that gets stdout and stderr in one stream reads JSON in every line.
    log.info(event, **fields)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
