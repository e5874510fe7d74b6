"""This project's engine as a peer, under the policy named on the command line.

Uses the engine's public interface (requests, steps, figures), except for the filling of rows.
"""

import sys
import time
from typing import Literal

import torch
from torch import Tensor

from a2sf.engine.config import EngineConfig
from a2sf.engine.engine import Engine
from a2sf.model.loader import LoadedModel, load_model
from a2sf.policy import CachePolicy
from a2sf.requests import GenerationRequest, Sampling

from .loop import Filling, serve, timed

PREFILL_CHUNK = 512

Method = Literal["a2sf", "window", "full"]
METHODS: dict[str, Method] = {"a2sf": "a2sf", "window": "window", "full": "full"}


def policy(method: Method, budget: int | None) -> CachePolicy:
    """Return a variant's policy; A2SF has one alpha for all heads; a table costs the same."""
    if method == "full":
        return CachePolicy(preset="full", prefill_chunk=PREFILL_CHUNK)
    if method == "window":
        return CachePolicy(preset="window", budget=budget, prefill_chunk=PREFILL_CHUNK)
    assert budget is not None
    return CachePolicy(alpha=0.9, budget=budget, recent=budget // 8, prefill_chunk=PREFILL_CHUNK)


class CopyingEngine(Engine):
    """An engine for identical requests: the first is prefilled, the others copy its row.

    It uses the engine's private members, because to prefill sixteen rows with 8,192 tokens each
    would take longer than all measurements that follow.
    """

    def _prefill(self) -> Tensor | None:
        sequence = self._prefilling
        if sequence is None or not self._active:
            return super()._prefill()
        first = self._active[0]
        sequence.prefilled = first.prefilled
        sequence.generated = list(first.generated)
        sequence.running = True
        self._decoder.join(
            len(self._active), self._slab, 0, first.stored, sequence.policy, sequence.max_len
        )
        self._active.append(sequence)
        self._prefilling = None
        self._sampler.forget_batch()
        return None


def fill_rows(engine: Engine, filling: Filling) -> tuple[float, float]:
    """Fill every row with the prompt.

    Returns the seconds of the first row's prefill, and the number of tokens of a row afterwards.
    """
    for row in range(filling.batch):
        engine.submit(
            GenerationRequest(
                request_id=str(row),
                prompt_ids=tuple(filling.prompt),
                # The rows filled first decode while the others are copied from them.
                max_new_tokens=decoded_at_most(filling),
                ignore_eos=True,
                sampling=Sampling(temperature=0.0),
            )
        )
    chunks = -(-len(filling.prompt) // PREFILL_CHUNK)
    start = time.perf_counter()
    for _ in range(chunks):
        engine.step()
    prefill_s = time.perf_counter() - start
    for _ in range(filling.batch - 1):
        engine.step()
    assert engine.running == filling.batch
    assert not engine.waiting
    decoded = filling.batch - 1
    return prefill_s, len(filling.prompt) + decoded


def decoded_at_most(filling: Filling) -> int:
    """Tokens that the first row decodes: while the others are filled, and afterwards."""
    return filling.batch + filling.room + 1


class Rows:
    """Rows of an engine that decode together."""

    def __init__(self, model: LoadedModel, method: Method, filling: Filling) -> None:
        requested_policy = policy(method, filling.budget)
        room = len(filling.prompt) + decoded_at_most(filling)
        slots = room if filling.budget is None else filling.budget
        self._engine = CopyingEngine(
            model,
            EngineConfig(
                slots=slots,
                max_batch=filling.batch,
                max_prefill_tokens=min(len(filling.prompt), slots - 1 + PREFILL_CHUNK),
                default_policy=requested_policy,
            ),
        )
        self._budget = filling.budget
        self.prefill_s, self._seen = fill_rows(self._engine, filling)
        self.kv_bytes = self._engine.kv_slab_bytes

    def step(self) -> float:
        """Decode one token of every row."""
        self._seen += 1
        return timed(self._engine.step)

    def kv_tokens(self) -> float:
        """Tokens of a row: all tokens until the budget is reached, then the budget."""
        return self._seen if self._budget is None else min(self._seen, self._budget)

    def close(self) -> None:
        """Release the memory; nothing else is held."""
        del self._engine


class Ours:
    """The engine under one method."""

    packages = ("torch", "transformers", "a2sf-serve")

    def __init__(self, method: Method) -> None:
        self._method: Method = method

    def load(self, model: str, dtype: str, threads: int) -> None:
        """Load the model for the processor."""
        torch.set_num_threads(threads)
        self._model = load_model(model, device="cpu", dtype=dtype)

    def fill(self, filling: Filling) -> Rows:
        """Make an engine of exactly these rows."""
        return Rows(self._model, self._method, filling)


if __name__ == "__main__":
    serve(Ours(METHODS[sys.argv[1]]))
