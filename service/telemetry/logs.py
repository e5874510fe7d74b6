"""The process's log: one stream of lines on stderr.

Owns the format of a line, as logfmt text or as JSON, and formats lines of structlog and of the
standard library's loggers in the same way, with the context variables of the current call. A value
can never begin a new line: unprintable characters are escaped. Knows nothing of what is logged.
"""

import logging
from typing import Any, Literal

import structlog
from structlog.types import EventDict, Processor

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

LEADING = ("time", "level", "logger", "event")

# Applied to every line, in the thread and context that wrote it.
_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    structlog.processors.StackInfoRenderer(),
]

_logfmt = structlog.processors.LogfmtRenderer(
    key_order=LEADING, drop_missing=True, bool_as_flag=False
)


class LoggedFailure(Exception):
    """A failure that was already logged, with its cause and the request id."""


class _Output(logging.StreamHandler[Any]):
    """The root handler that `configure` installs."""


def configure(format: Format, level: Level) -> None:
    """Send all log lines of this process of at least `level` to stderr in `format`.

    Call it once, after the libraries are imported: it removes the stderr handlers that they have
    installed. A second call changes format and level.

    `text`: `time=... level=... logger=... event=... key=value`, and below an error its traceback,
    each line after `  | `. `json`: one object per line, with the traceback in the field
    `exception`.
    """
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *_SHARED,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    output = _Output()
    output.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                *((_text,) if format == "text" else (_leading, _json)),
            ],
        )
    )
    for handler in [h for h in logging.root.handlers if isinstance(h, _Output)]:
        logging.root.removeHandler(handler)
    logging.root.addHandler(output)
    logging.root.setLevel(level.upper())
    _take_over()


def _take_over() -> None:
    """Route lines that libraries print themselves to the root: transformers, `warnings`."""
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            own = [h for h in logger.handlers if type(h) is logging.StreamHandler]
            for handler in own:
                logger.removeHandler(handler)
                logger.propagate = True
    logging.captureWarnings(True)


def _text(logger: Any, name: str, event_dict: EventDict) -> str:
    blocks = [event_dict.pop(key, None) or "" for key in ("exception", "stack")]
    rows = [row for block in blocks for row in block.splitlines()]
    line = _logfmt(logger, name, event_dict)
    return "\n  | ".join(map(_printable, (line, *rows)))


def _printable(line: str) -> str:
    """Escape line breaks, terminal sequences and the like; keep letters of all languages."""
    # Only characters that occur, because a line may be a whole prompt.
    escaped = {c: c.encode("unicode_escape").decode() for c in set(line) if not c.isprintable()}
    return line.translate({ord(c): escape for c, escape in escaped.items()})


def _leading(logger: Any, name: str, event_dict: EventDict) -> EventDict:
    return {key: event_dict.pop(key) for key in LEADING if key in event_dict} | dict(event_dict)


_json = structlog.processors.JSONRenderer(default=str)
