"""Runs the command line's completion, single answer or conversation.

Owns the conversation's history and its commands. Knows nothing of flags, or of how events and
errors are shown.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from a2sf.errors import A2SFError
from a2sf.requests import ChatMessage
from service.client import calls
from service.client.requests import GenerationOptions
from service.client.results import Delta
from service.client.sync import SyncClient
from service.client.terminal.display import Display
from service.client.terminal.interrupt import Interrupt

HINT = "/reset clears the conversation; /quit or the end of input exits"


@dataclass(frozen=True)
class Session:
    """One run of the command line with one server."""

    client: SyncClient
    max_new_tokens: int
    timeout_s: float
    options: GenerationOptions
    display: Callable[[], Display]
    interrupt: Interrupt
    report: Callable[[A2SFError], None]

    def complete(self, prompt: str | Sequence[ChatMessage]) -> str:
        """Complete `prompt`, show the events as they arrive, and return the text."""
        call = calls.stream_generate(prompt, self.max_new_tokens, self.options)
        read = call.read
        with_message = calls.Call(
            call.stub, call.method, call.request, lambda message: (message, read(message))
        )
        text: list[str] = []
        with (
            self.interrupt.ending(self.client.close),
            closing(self.client.stream(with_message, self.timeout_s)) as events,
            self.display() as display,
        ):
            for message, event in events:
                display.show(message, event)
                if isinstance(event, Delta):
                    text.append(event.text)
        return "".join(text)

    def answer(self, message: str, system: str | None) -> None:
        """Answer one message."""
        self.complete([*_first(system), ChatMessage(role="user", content=message)])

    def converse(self, system: str | None) -> None:
        """Answer each line of stdin, with the conversation so far as context.

        A failed call ends the conversation, unless stdin is a terminal.
        """
        interactive = sys.stdin.isatty()
        if interactive:
            print(HINT, file=sys.stderr)
        history = _first(system)
        for line in _lines():
            if line == "/quit":
                return
            if line == "/reset":
                history = _first(system)
                continue
            messages = [*history, ChatMessage(role="user", content=line)]
            try:
                text = self.complete(messages)
            except A2SFError as error:
                if not interactive:
                    raise
                self.report(error)
            else:
                history = [*messages, ChatMessage(role="assistant", content=text)]


def _first(system: str | None) -> list[ChatMessage]:
    return [] if system is None else [ChatMessage(role="system", content=system)]


def _lines() -> Iterator[str]:
    """Yield the lines that are not blank; show a prompt if stdin and stdout are terminals."""
    question = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(question).strip()
        except EOFError:
            return
        if line:
            yield line
