"""Shows a completion or an error on the command line, as text or as JSON.

Owns which output goes to which stream. As text, the completion goes to stdout as it arrives, and
one line of figures follows at the end. If stderr is a terminal, a live line of figures is shown
below the text until the end. An error goes to stderr, in one line. Knows nothing of exit codes or
of calls.
"""

import json
import sys
import time
from itertools import chain
from types import TracebackType
from typing import Any, Protocol, Self

import typer
from google.protobuf.json_format import MessageToJson
from rich.cells import chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from a2sf.errors import A2SFError, InvalidArgument
from a2sf.policy import OWN_RECENT, CachePolicy
from a2sf.requests import Finished
from service.client.results import Delta, StreamEvent, StreamStarted, TokenLogprob, TokenLogprobs
from service.pb import inference_pb2 as pb
from service.policy_messages import describe_policy
from service.status import NoRoom, code_of

# A terminal obeys control characters, and a model may write any of them.
_CONTROLS = {
    **dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), "\ufffd"),
    **{ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""},
}


class Display(Protocol):
    """Shows one completion, from `__enter__` to `__exit__`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def show(self, message: pb.StreamGenerateResponse, event: StreamEvent | None) -> None:
        """Show one event; `message` is the message that it was read from."""


class JsonLinesDisplay:
    """Prints each event as a line of JSON: protobuf's JSON form with the proto's field names."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do nothing: there is nothing left to show."""

    def show(self, message: pb.StreamGenerateResponse, event: StreamEvent | None) -> None:
        """Print one event."""
        line = MessageToJson(
            message, preserving_proto_field_name=True, indent=None, ensure_ascii=False
        )
        print(line, flush=True)


class TextDisplay:
    """Shows the text, the requested details of its tokens, and the figures."""

    def __init__(self) -> None:
        self._tokens: list[TokenLogprobs] = []
        self._mid_line = False
        self._live = _LiveFigures() if sys.stderr.isatty() else None
        self._policy = ""
        self._heads_differ = False

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_live()
        # The next output, such as an error, must begin on a new line.
        if self._mid_line and not isinstance(exc, BrokenPipeError):
            print(flush=True)

    def show(self, message: pb.StreamGenerateResponse, event: StreamEvent | None) -> None:
        """Show one event."""
        match event:
            case StreamStarted():
                self._policy = describe_policy(effective_policy(event), event.min_budget)
                self._heads_differ = len(set(chain(*event.head_budgets))) > 1
                if self._live is not None:
                    self._live.started(event)
                if event.prompt is not None:
                    self._write(event.prompt.text)
            case Delta():
                self._tokens.extend(event.logprobs)
                if self._live is not None:
                    self._live.add_tokens(len(event.token_ids))
                self._write(event.text)
            case Finished():
                self._end_live()
                self._mid_line = False
                print()
                for token in self._tokens:
                    print(_token_line(token))
                print(figures(event, self._policy, self._heads_differ), flush=True)

    def _write(self, text: str) -> None:
        if sys.stdout.isatty():
            text = text.translate(_CONTROLS)
        if text:
            self._mid_line = not text.endswith("\n")
        if self._live is not None and self._live.takes_text:
            self._live.write(text)
        else:
            print(text, end="", flush=True)

    def _end_live(self) -> None:
        if self._live is not None:
            print(self._live.stop(), end="", flush=True)
            self._live = None


class _LiveFigures:
    """The line of figures below the text, redrawn several times a second.

    If stdout is a terminal too, both share a screen. Then the unfinished last line of the text is
    drawn together with this line, and `takes_text` is True.
    """

    def __init__(self) -> None:
        self.takes_text = sys.stdout.isatty()
        self._console = Console(stderr=not self.takes_text, highlight=False)
        self._live = Live(
            self,
            console=self._console,
            refresh_per_second=8,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._spinner = Spinner("dots", style="cyan")
        self._line = ""
        self._started: StreamStarted | None = None
        self._tokens = 0
        self._since = time.monotonic()

    def start(self) -> None:
        self._live.start()

    def stop(self) -> str:
        """Remove the line; return the text that was drawn with it."""
        self._live.stop()
        return self._line

    def started(self, event: StreamStarted) -> None:
        self._started = event

    def add_tokens(self, tokens: int) -> None:
        if self._tokens == 0 and tokens:
            self._since = time.monotonic()
        self._tokens += tokens

    def write(self, text: str) -> None:
        # Finished lines scroll up, wrapped as the terminal itself would wrap them.
        *done, last = (self._line + text.expandtabs()).split("\n")
        rows = chop_cells(last, self._console.width) or [""]
        # Set it before printing, because printing redraws this line below the output.
        self._line = rows[-1]
        for line in [*done, *rows[:-1]]:
            self._console.print(Text(line), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._line:
            yield Text(self._line)
        self._spinner.update(text=Text(self._figures(), style="dim"))
        yield self._spinner

    def _figures(self) -> str:
        elapsed = time.monotonic() - self._since
        started, tokens = self._started, self._tokens
        if started is None:
            return f"waiting for the server, {elapsed:.0f} s"
        if not tokens:
            return f"reading {started.prompt_tokens} tokens, {elapsed:.0f} s"
        # The newest token is not in the cache yet.
        cached = started.prompt_tokens + tokens - 1
        budgets = list(chain(*started.head_budgets)) or [started.budget]
        evicted = [max(0, cached - budget) for budget in budgets]
        rate = f"{(tokens - 1) / elapsed:.1f} tokens/s, " if tokens > 1 else ""
        return f"{tokens} tokens, {rate}evicted {round(sum(evicted) / len(evicted))} of {cached}"


def effective_policy(event: StreamStarted) -> CachePolicy:
    """Return the policy of a completion, with the numbers that apply to it."""
    if event.method == "table":
        numbers: dict[str, object] = {"table": event.table_name}
    elif event.alpha is not None:
        numbers = {"alpha": event.alpha}
    else:
        numbers = {"preset": event.method}
    if event.method not in OWN_RECENT:
        numbers["recent"] = event.recent
    if event.method != "full":
        numbers["budget"] = event.budget
    return CachePolicy.model_validate(numbers)


def figures(event: Finished, policy: str, heads_differ: bool) -> str:
    """Describe the figures of a completion and its policy in one line.

    With `heads_differ`, the number of tokens that each head kept is a mean over heads.
    """
    usage, cache, timings = event.usage, event.cache, event.timings
    tokens = usage.completion_tokens
    # The prefill gives the first token; `decode_s` covers the others.
    rate = f"{(tokens - 1) / timings.decode_s:.1f} tokens/s" if timings.decode_s > 0 else "at once"
    average = " on average" if heads_differ else ""
    return (
        f"{tokens} tokens ({event.reason.value}), {rate}; {policy}; "
        f"each head kept {cache.kept_tokens} of {cache.kept_tokens + cache.evicted_tokens} "
        f"tokens{average}, evicted {cache.evicted_tokens}; "
        f"KV {decimal(cache.kv_bytes)} against {decimal(cache.kv_bytes_full)} in a full cache"
    )


def _token_line(token: TokenLogprobs) -> str:
    others = "  ".join(_logprob(other) for other in token.top)
    return f"{token.logprob:9.4f}  {token.text!r}" + (f"  of  {others}" if others else "")


def _logprob(token: TokenLogprob) -> str:
    return f"{token.text!r} {token.logprob:.4f}"


def report_line(error: A2SFError) -> None:
    """Print an error as one line that lists all its problems."""
    # Print the partial completion before the error.
    sys.stdout.flush()
    # Report all problems, so that the user need not fix them one by one.
    problems = "; ".join(f"{f}: {d}" for f, d in _violations(error)) or str(error)
    typer.echo(f"error: {' '.join(problems.split())}", err=True)


def report_json(error: A2SFError) -> None:
    """Print an error as a JSON object: `code`, `message`, and any known details."""
    shown: dict[str, Any] = {"code": code_of(error).name, "message": str(error)}
    if error.request_id:
        shown["request_id"] = error.request_id
    if violations := _violations(error):
        shown["field_violations"] = [{"field": f, "description": d} for f, d in violations]
    elif isinstance(error, NoRoom) and error.retry_after_s is not None:
        shown["retry_after_seconds"] = error.retry_after_s
    sys.stdout.flush()
    typer.echo(json.dumps({"error": shown}), err=True)


def _violations(error: A2SFError) -> tuple[tuple[str, str], ...]:
    """Return the invalid fields with their problems; empty if the error is not about fields."""
    return error.violations if isinstance(error, InvalidArgument) else ()
