"""A worker without a peer behind it, run as a script: it fails in the way that its budget names."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from peers.loop import Filling, NotSupported, serve

BROKEN, UNSUPPORTED, DYING, SILENT = 1, 2, 3, 4
"""Budgets that make a filling fail."""


class FakeSeat:
    """Rows that hold a token more after every step."""

    prefill_s = 0.5
    kv_bytes = 1024

    def __init__(self, filling: Filling) -> None:
        self._tokens = len(filling.prompt)
        self._left = filling.room

    def step(self) -> float:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("no room left")
        self._tokens += 1
        return 0.002

    def kv_tokens(self) -> float:
        return self._tokens

    def close(self) -> None:
        print("this must not get between the answers")


class FakePeer:
    packages = ("pytest", "no-such-package")

    def load(self, model: str, dtype: str, threads: int) -> None:
        self.loaded = (model, dtype, threads)

    def fill(self, filling: Filling) -> FakeSeat:
        if filling.budget == BROKEN:
            raise KeyError("layers")
        if filling.budget == UNSUPPORTED:
            raise NotSupported("a budget of 2 is beyond it")
        if filling.budget == DYING:
            os._exit(7)
        if filling.budget == SILENT:
            time.sleep(60)
        return FakeSeat(filling)


if __name__ == "__main__":
    serve(FakePeer())
