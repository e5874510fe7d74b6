"""`generate` of transformers with its dynamic cache as a peer.

One row is prefilled and copied to all. `generate` then continues, and its streamer blocks it after
each token until the next is requested. `generate` runs in the main thread, and another thread reads
the commands. OpenMP would give work in another thread a second pool, which waits in a different
way, and the times would not be comparable with those of the other peers.
"""

import copy
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.streamers import BaseStreamer

from .loop import Filling, serve, timed


class Ended(Exception):
    """Raised inside `generate` to leave it."""


class Gate(BaseStreamer):  # type: ignore[misc]
    """Lets `generate` make one token at a time, and times each token."""

    def __init__(self) -> None:
        self._go = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)
        self._prompt_seen = False
        self._ending = False
        self._started = 0.0
        self._seconds = 0.0
        self._failure: Exception | None = None

    def put(self, value: Any) -> None:
        """Called by `generate`: with the prompt first, then with each step's tokens."""
        if self._prompt_seen:
            self._seconds = time.perf_counter() - self._started
            self._arrived.release()
        self._prompt_seen = True
        self._go.acquire()
        if self._ending:
            raise Ended
        self._started = time.perf_counter()

    def end(self) -> None:
        """Called by `generate` when it ends."""

    def step(self) -> float:
        """Let one token through; returns its seconds."""
        self._go.release()
        self._arrived.acquire()
        if self._failure is not None:
            raise self._failure
        return self._seconds

    def leave(self) -> None:
        """Make `generate` return."""
        self._ending = True
        self._go.release()

    def fail(self, error: Exception) -> None:
        """Report the error to the waiting thread, now and at a later call."""
        self._failure = error
        for _ in range(2):
            self._arrived.release()


class Rows:
    """Rows that one call of `generate` continues."""

    def __init__(self, peer: "Dynamic", filling: Filling, row: Any, prefill_s: float) -> None:
        self.prefill_s = prefill_s
        self._gate = Gate()
        self._over = threading.Event()
        self._cache: Any = None
        peer.main.run(lambda: self._copy(row, filling.batch))
        peer.main.start(lambda: self._generate(peer.model, filling))

    def _copy(self, row: Any, batch: int) -> None:
        self._cache = copy.deepcopy(row)
        self._cache.batch_repeat_interleave(batch)

    def _generate(self, model: Any, filling: Filling) -> None:
        # The cache does not contain the newest token yet.
        ids = torch.tensor([[*filling.prompt, filling.prompt[-1]]] * filling.batch)
        try:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self._cache,
                max_new_tokens=filling.room,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=self._gate,
            )
            self._gate.fail(RuntimeError("generate ended before the measurement did"))
        except Ended:
            pass
        except Exception as error:
            self._gate.fail(error)
        finally:
            self._cache = None
            self._over.set()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache's tensors."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    def step(self) -> float:
        """Decode one token of every row."""
        return self._gate.step()

    def kv_tokens(self) -> float:
        """Return the cache's length, which grows by one token per step."""
        return float(self._cache.get_seq_length())

    def close(self) -> None:
        """Leave `generate`, which releases its cache."""
        self._gate.leave()
        self._over.wait()


class MainThread:
    """Runs jobs from other threads in the main thread."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()

    def work(self) -> None:
        """Run jobs until `stop`; called by the main thread."""
        while (job := self._jobs.get()) is not None:
            job()

    def stop(self) -> None:
        """Make `work` return after the jobs before this call."""
        self._jobs.put(None)

    def start(self, job: Callable[[], None]) -> None:
        """Submit a job without waiting; the job reports its end."""
        self._jobs.put(job)

    def run(self, job: Callable[[], None]) -> None:
        """Run a job, wait for it, and raise its exception."""
        failure: list[Exception] = []
        done = threading.Event()

        def guarded() -> None:
            try:
                job()
            except Exception as error:
                failure.append(error)
            done.set()

        self._jobs.put(guarded)
        done.wait()
        if failure:
            raise failure[0]


class Dynamic:
    """`generate` with a cache that grows; fills one seat at a time."""

    packages = ("torch", "transformers")

    def __init__(self) -> None:
        self.main = MainThread()
        self.model: Any = None
        self._row: tuple[list[int], Any, float] | None = None

    def load(self, model: str, dtype: str, threads: int) -> None:
        """Load the model with its default attention."""

        def job() -> None:
            torch.set_num_threads(threads)
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
            self.model.eval()

        self.main.run(job)

    def fill(self, filling: Filling) -> Rows:
        """Prefill one row, unless the last prompt was the same, and copy it to all rows."""
        if self._row is None or self._row[0] != filling.prompt:
            self._row = None
            cache = DynamicCache(config=self.model.config)
            seconds = [0.0]

            @torch.no_grad()
            def job() -> None:
                ids = torch.tensor([filling.prompt])
                seconds[0] = timed(lambda: self.model(ids, past_key_values=cache, logits_to_keep=1))

            self.main.run(job)
            self._row = (filling.prompt, cache, seconds[0])
        return Rows(self, filling, *self._row[1:])

    def serve(self) -> None:
        """Read commands in a thread, and compute in this one."""

        def read() -> None:
            try:
                serve(self)
            finally:
                self.main.stop()

        threading.Thread(target=read, daemon=True).start()
        self.main.work()


if __name__ == "__main__":
    Dynamic().serve()
