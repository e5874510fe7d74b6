"""The process's log: one stream of lines on stderr, whoever writes them.

Owns how a line looks, as text for people (logfmt) or as JSON for collectors, and brings the lines
of structlog and of the standard library's loggers into the same form, with the context variables
of the call in which they were written. A value can never begin a line of its own: whatever is not
printable is escaped. Knows nothing of what is logged.
"""

import logging
from typing import Any, Literal

import structlog
from structlog.types import EventDict, Processor

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

LEADING = ("time", "level", "logger", "event")

# What every line goes through, in the thread and context that wrote it.
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
    """A failure of ours that the log has already, with its cause and the request's id."""


class _Output(logging.StreamHandler[Any]):
    """The root logger's handler that `configure` put there."""


def configure(format: Format, level: Level) -> None:
    """Send every line of this process to stderr in `format`, from `level` on.

    Call it once, after the libraries are imported: those that write to stderr by a handler of
    their own lose it here. Calling it again changes format and level.

    `text`: `time=... level=... logger=... event=... key=value`, and below an error its traceback,
    each line behind `  | `. `json`: one object a line; a traceback is its field `exception`.
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
    """Let lines come up to the root that libraries print themselves: transformers, `warnings`."""
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
    """Escape line breaks, terminal sequences and the like; letters of any language stay."""
    # Of the characters that occur: a line may be a whole prompt.
    escaped = {c: c.encode("unicode_escape").decode() for c in set(line) if not c.isprintable()}
    return line.translate({ord(c): escape for c, escape in escaped.items()})


def _leading(logger: Any, name: str, event_dict: EventDict) -> EventDict:
    return {key: event_dict.pop(key) for key in LEADING if key in event_dict} | dict(event_dict)


_json = structlog.processors.JSONRenderer(default=str)
