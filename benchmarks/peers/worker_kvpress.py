"""kvpress as a peer: the press named on the command line, in prefill and in decoding.

One row is prefilled under the press and copied to all. Decoding then follows kvpress's pipeline,
with explicit positions, which are larger than the cache is long. A decoding press evicts after a
fixed number of steps: here once per turn, so that each turn contains the cost of one eviction.
"""

import copy
import sys
from typing import Any

import torch
from kvpress import DecodingPress, KnormPress, PrefillDecodingPress, TOVAPress
from transformers import AutoModelForCausalLM, DynamicCache

from .loop import Filling, serve, timed

PRESSES = {"knorm": KnormPress, "tova": TOVAPress}


class Rows:
    """Rows whose cache the press reduces once per turn."""

    def __init__(self, model: Any, base: Any, filling: Filling) -> None:
        assert filling.budget is not None
        length = len(filling.prompt)
        self._model = model
        self._turn = filling.turn
        self._press = PrefillDecodingPress(
            prefilling_press=base(compression_ratio=max(0.0, 1 - filling.budget / length)),
            decoding_press=DecodingPress(
                base_press=base(),
                compression_interval=filling.turn,
                target_size=filling.budget,
                hidden_states_buffer_size=filling.turn,
            ),
        )
        self._hooks: Any = None
        self._steps = 0
        self._position = length
        row = DynamicCache(config=model.config)
        ids = torch.tensor([filling.prompt])
        with torch.no_grad(), self._press(model):
            self.prefill_s = timed(lambda: model(ids, past_key_values=row, logits_to_keep=1))
        self._cache = copy.deepcopy(row)
        self._cache.batch_repeat_interleave(filling.batch)
        self._token = torch.full((filling.batch, 1), filling.prompt[-1])

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache's tensors."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    def step(self) -> float:
        """Decode one token of every row, with only these rows' hooks active."""
        if self._hooks is None:
            self._hooks = self._press(self._model)
            self._hooks.__enter__()
        seconds = timed(self._decode)
        self._steps += 1
        self._position += 1
        if self._steps % self._turn == 0:
            self._leave()
        return seconds

    @torch.no_grad()
    def _decode(self) -> None:
        positions = torch.full_like(self._token, self._position)
        output = self._model(
            self._token, past_key_values=self._cache, position_ids=positions, logits_to_keep=1
        )
        self._token = output.logits[:, -1].argmax(-1)[:, None]

    def _leave(self) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks = None

    def kv_tokens(self) -> float:
        """Tokens in the first layer, as in all: the budget, and the tokens added in this turn."""
        return float(self._cache.get_seq_length())

    def close(self) -> None:
        """Remove the hooks, and release the cache."""
        self._leave()
        del self._cache


class Kvpress:
    """A model of transformers under a press."""

    packages = ("torch", "transformers", "kvpress")

    def __init__(self, base: Any) -> None:
        self._base = base

    def load(self, model: str, dtype: str, threads: int) -> None:
        """Load the model with its default attention."""
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model.eval()

    def fill(self, filling: Filling) -> Rows:
        """Prefill a row under the press, and copy it to all."""
        return Rows(self._model, self._base, filling)


if __name__ == "__main__":
    serve(Kvpress(PRESSES[sys.argv[1]]))
