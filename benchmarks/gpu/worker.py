"""Worker in a separate process: transformers with a compiled static cache, and kvpress.

It is started as a script by any interpreter that has torch and transformers (`--peer-python` for
kvpress), and uses the protocol of `benchmarks/peers/loop.py`. The model is random, made on the
device from a directory that contains only a configuration. Imports nothing of this project except
that protocol and the presses' peer.

    python worker.py static|eager|knorm|tova
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peers.loop import Filling, serve  # type: ignore[import-not-found]
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(directory: str, dtype: str) -> Any:
    """Make a random model with the directory's configuration, on the device."""
    torch.set_default_device(DEVICE)
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def wait() -> None:
    """Wait until the device has finished its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class StaticRows:
    """Rows of a static cache that was filled by random numbers."""

    prefill_s = 0.0

    def __init__(self, model: Any, forward: Any, filling: Filling) -> None:
        config = model.config
        length = len(filling.prompt)
        self._forward = forward
        self._cache = StaticCache(config=config, max_cache_len=length + filling.room + 1)
        self._cache.early_initialization(
            batch_size=filling.batch,
            num_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=model.dtype,
            device=torch.device(DEVICE),
        )
        for layer in self._cache.layers:
            layer.keys[:, :, :length].normal_()
            layer.values[:, :, :length].normal_()
            layer.cumulative_length.fill_(length)
        self._ids = torch.full((filling.batch, 1), filling.prompt[-1])
        self._position = length

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache's tensors."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    @torch.inference_mode()
    def _decode(self) -> None:
        positions = torch.full_like(self._ids, self._position)
        output = self._forward(
            input_ids=self._ids,
            position_ids=positions,
            past_key_values=self._cache,
            logits_to_keep=1,
        )
        # Cloned, because the next replay overwrites these logits.
        self._ids = output.logits[:, -1].argmax(-1, keepdim=True).clone()
        self._ids.tolist()

    def step(self) -> float:
        """Decode a token of every row and bring it to the host; returns seconds."""
        from peers.loop import timed

        seconds: float = timed(self._decode)
        self._position += 1
        return seconds

    def kv_tokens(self) -> float:
        """Tokens in the cache now."""
        return float(self._position)

    def close(self) -> None:
        """Release the cache."""
        del self._cache


class Static:
    """The model's forward pass as `generate` compiles it for a static cache, or uncompiled."""

    packages = ("torch", "transformers", "triton")

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled

    def load(self, model: str, dtype: str, threads: int) -> None:
        """Make the model; compilation happens in the first step."""
        torch.set_num_threads(threads)
        self._model = load(model, dtype)
        self._forward = self._model.forward
        if self._compiled:
            self._forward = torch.compile(self._model.forward, mode="reduce-overhead")

    def fill(self, filling: Filling) -> StaticRows:
        """Make a cache of exactly these rows."""
        return StaticRows(self._model, self._forward, filling)


def kvpress_peer(press: str) -> Any:
    """kvpress's peer, on this device and with a random model."""
    from peers.worker_kvpress import PRESSES, Kvpress, Rows  # type: ignore[import-not-found]

    class DeviceRows(Rows):  # type: ignore[misc]
        def _decode(self) -> None:
            super()._decode()
            wait()

    class DeviceKvpress(Kvpress):  # type: ignore[misc]
        def load(self, model: str, dtype: str, threads: int) -> None:
            torch.set_num_threads(threads)
            self._model = load(model, dtype)

        def fill(self, filling: Filling) -> DeviceRows:
            return DeviceRows(self._model, self._base, filling)

    return DeviceKvpress(PRESSES[press])


if __name__ == "__main__":
    kind = sys.argv[1]
    serve(Static(kind == "static") if kind in ("static", "eager") else kvpress_peer(kind))
