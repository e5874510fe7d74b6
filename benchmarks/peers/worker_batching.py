"""Continuous batching of transformers (the implementation of `generate_batch`) as a peer.

The public function runs a loop in a thread until all requests end. Here the body of that loop is
called once per step. Rows share the pages of their common prompt. That makes the filling shorter,
and favours this peer, because it reads shared pages from the processor's cache. On processors it
has no paged kernel, and gathers the pages of all rows into one sequence under one mask.
"""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from .loop import Filling, serve, timed

PAGE = 256
"""Tokens of a page, transformers' default."""
PREFILL_CHUNK = 512


class Rows:
    """Requests of one manager that decode together."""

    def __init__(self, model: Any, filling: Filling) -> None:
        length, batch = len(filling.prompt), filling.batch
        # Rows that are filled first already decode while the others are filled.
        longest = length + filling.room + 2 * batch + 4
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=batch * (-(-longest // PAGE) + 1),
            max_batch_tokens=PREFILL_CHUNK,
            max_requests_per_batch=batch,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        generation = GenerationConfig(
            max_new_tokens=longest - length, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=config
        )
        with torch.no_grad():
            self._loop = self._manager._create_batch_processor()
        self._manager.batch_processor = self._loop
        self._manager.current_batch = 0
        self._batch, self._length = batch, length
        self._states: list[Any] = []
        start = time.perf_counter()
        self._add(filling)
        self.prefill_s = time.perf_counter() - start
        for _ in range(batch - 1):
            self._add(filling)
        self.kv_bytes = int(self._loop.cache.cache_tensor.nbytes)

    def _add(self, filling: Filling) -> None:
        """Add a request and continue until it has its first token."""
        name = self._manager.add_request(filling.prompt)
        for _ in range(2 * (-(-len(filling.prompt) // PREFILL_CHUNK)) + 2):
            self._advance()
            state = self._loop.scheduler.active_requests.get(name)
            if state is not None and state.generated_len():
                self._states.append(state)
                return
        raise RuntimeError(f"request {name} has no token after its whole prompt was read")

    @torch.no_grad()
    def _advance(self) -> None:
        self._manager._generation_loop_body(self._loop, bootstrapping=False)

    def step(self) -> float:
        """Decode one token of every row."""
        before = self._generated()
        seconds = timed(self._advance)
        made = self._generated() - before
        if made != self._batch:
            raise RuntimeError(f"{made} of {self._batch} rows were decoded in a step")
        return seconds

    def _generated(self) -> int:
        return sum(state.generated_len() for state in self._states)

    def kv_tokens(self) -> float:
        """The prompt and the generated tokens, except the newest one."""
        return self._length + self._generated() / self._batch - 1

    def close(self) -> None:
        """Free every row's pages."""
        self._loop.reset()
        self._manager.batch_processor = None
        del self._loop, self._manager


class Batching:
    """A model of transformers whose requests share pages and batches."""

    packages = ("torch", "transformers")

    def load(self, model: str, dtype: str, threads: int) -> None:
        """Load the model; the manager switches its attention to the paged kind."""
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model.eval()

    def fill(self, filling: Filling) -> Rows:
        """Make a manager with a pool of exactly these rows."""
        return Rows(self._model, filling)


if __name__ == "__main__":
    serve(Batching())
