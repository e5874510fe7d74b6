"""The grid's side of a worker: a child process that answers one command at a time, in limited time.

Knows the protocol's frame (one JSON line in each direction) and nothing of the commands.
"""

import contextlib
import json
import queue
import signal
import subprocess
import threading
from pathlib import Path
from typing import IO, Any


class Refused(Exception):
    """The worker answered with an error; `supported` is False if it can never do this."""

    def __init__(self, reason: str, supported: bool) -> None:
        super().__init__(reason)
        self.supported = supported


class Gone(Exception):
    """The worker ended, or was ended because it did not answer in time."""


class Client:
    """A worker process. It is ended through its handle only, never by name."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._log = log
        self._answers: queue.Queue[str | None] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._answers.put(line)
        self._answers.put(None)

    def ask(self, timeout_s: float, **command: Any) -> dict[str, Any]:
        """Send a command and return the answer.

        Raises Refused if the answer is an error, and Gone, after ending the process, if there is no
        answer.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.kill()
            raise Gone(f"no answer to {command['do']} within {timeout_s:g} s") from None
        except (OSError, ValueError):  # the worker's end of the pipe is gone, or ours is closed
            line = None
        if line is None:
            self.kill()
            raise Gone(f"the worker ended during {command['do']}: {self._ending()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"], answer["supported"])
        return answer

    def _ending(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return signal.Signals(-code).name
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"exit {code}" + "".join(f", {line[:300]}" for line in last)

    def end(self, timeout_s: float = 30) -> None:
        """Ask the process to end, and kill it if it does not."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write('{"do": "end"}\n')
            self._process.stdin.close()
            self._process.wait(timeout_s)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self.kill()

    def kill(self) -> None:
        """Kill the process, unless it has ended."""
        try:
            # It may be about to end, and its exit code is more informative than a kill.
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
