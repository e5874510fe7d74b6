"""The command line: `python -m service` serves, `python -m service plan` sizes a server.

Owns how failures are reported: one line on stderr, and exit code 2 for errors that the user can
fix. Knows nothing of gRPC or of the settings.
"""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress

import structlog

from a2sf.errors import A2SFError
from a2sf.threads import wait_passively
from service.backend.runner import EngineCrashed
from service.config import settings
from service.telemetry import logs

log = structlog.get_logger(__name__)


def serve(arguments: Sequence[str]) -> int:
    """Serve a model until SIGTERM or Ctrl-C; return the exit code."""
    loaded = settings.load(arguments)
    if loaded.print_config:
        print(loaded.as_toml(), end="")
        return 0
    wait_passively()
    # Imported here because it loads torch; help and flag errors must not wait for that.
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
    """Run the command line and exit; the word `serve` is optional."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["plan"]:
            # Imported here, because a server does not need it.
            from service.plan import cli

            cli.run(given[1:])
        code = serve(given[1:] if given[:1] == ["serve"] else given)
    except A2SFError as error:
        code = _fail(str(error), code=2)
    except EngineCrashed as error:
        # Not the user's error; the cause is in the log.
        code = _fail(str(error), code=1)
    sys.exit(code)


def _print(event: str, line: str, **fields: str | int) -> None:
    # The reader of stdout may have gone; the server continues.
    with suppress(BrokenPipeError):
        print(line, flush=True)


def _log(event: str, line: str, **fields: str | int) -> None:
    # If a collector reads stdout and stderr as one stream, every line must be JSON.
    log.info(event, **fields)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
