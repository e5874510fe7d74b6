"""The processes that share one model: who they are, what each holds, how the first leads the rest.

Owns joining the processes that torchrun started, dividing KV heads among them, and the messages by
which the first tells the others what to do. Knows nothing of models, requests or what is told.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from a2sf.errors import InvalidArgument

LONGEST_STEP = timedelta(minutes=10)
"""How long a rank waits for another in the middle of a computation, at most."""

_LONGEST_IDLE = timedelta(days=365)
"""How long one waits to be told something. A rank that ends is noticed at once all the same."""


class RankLost(RuntimeError):
    """Another of the processes that share the model has ended, or goes another way."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a model."""

    rank: int
    size: int
    device: torch.device
    """Where this process computes."""
    channel: dist.ProcessGroup | None = None
    """What messages go through; of one rank alone there is none."""

    @classmethod
    def join(cls, device: str) -> Self:
        """Meet the other processes; returns once all are there.

        `device` is the kind that the user wants, as for `load_model`; each rank takes the one of
        its own number. Raises InvalidArgument for a kind that would not be so.
        """
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("auto", kind):
            raise InvalidArgument(
                "device",
                f"{device!r}; accepted under torchrun on this machine: auto, {kind}; each process "
                "takes the device of its own number",
            )
        place = torch.device(kind)
        if kind == "cuda":
            place = torch.device(kind, int(os.environ["LOCAL_RANK"]))
            if place.index >= torch.cuda.device_count():
                raise InvalidArgument(
                    "--nproc-per-node",
                    f"process {place.index + 1} finds no CUDA device of its own; accepted on this "
                    f"machine: at most {torch.cuda.device_count()}",
                )
            torch.cuda.set_device(place)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            timeout=LONGEST_STEP,
            device_id=place if kind == "cuda" else None,
        )
        return cls(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            device=place,
            channel=dist.new_group(backend="gloo", timeout=_LONGEST_IDLE),
        )

    def share(self, num_kv_heads: int) -> tuple[int, int]:
        """Return which of so many KV heads this rank holds: from the first up to the second.

        Raises InvalidArgument where they cannot be divided evenly.
        """
        if num_kv_heads % self.size:
            accepted = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
            raise InvalidArgument(
                "--nproc-per-node",
                f"{self.size} processes cannot divide {num_kv_heads} KV heads evenly; accepted "
                f"for this model: {', '.join(map(str, accepted))}",
            )
        share = num_kv_heads // self.size
        return self.rank * share, (self.rank + 1) * share

    def tell(self, message: bytes) -> None:
        """Send a message from the first rank to all others. Raises RankLost where one is gone."""
        self._broadcast(torch.tensor([len(message)]))
        if message:
            self._broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8))

    def hear(self) -> bytes:
        """Wait for the first rank's next message, however long it takes.

        Raises RankLost where that rank is gone.
        """
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        message = torch.empty(int(length), dtype=torch.uint8)
        if len(message):
            self._broadcast(message)
        return message.numpy().tobytes()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Compute with the other ranks. Raises RankLost where one ends meanwhile."""
        try:
            yield
        except RuntimeError as error:
            # Of NCCL a type of its own; of gloo a RuntimeError that names the file it comes from.
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.size} has lost another, which must have ended"
            ) from error

    def _broadcast(self, tensor: Tensor) -> None:
        with self.together():
            dist.broadcast(tensor, src=0, group=self.channel)


class Attention(Protocol):
    """What attends in one layer, as `a2sf.models.LayerAttention` has it."""

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, /
    ) -> Tensor:
        """Return the output, [rows, H_q, width, D]."""


def of_own_heads(attention: Attention, held: tuple[int, int]) -> Attention:
    """Let `attention` see the `held` KV heads alone, and the query heads that share them.

    Some plans of transformers put all heads together in every process, and let each project its
    own heads' output: what is returned for the others is 0, and nobody reads it.
    """

    def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, /) -> Tensor:
        first, end = held
        if keys.shape[1] == end - first:
            return attention(layer, query, keys, values, scale)
        group = query.shape[1] // keys.shape[1]
        own = slice(first * group, end * group)
        output = torch.zeros_like(query)
        output[:, own] = attention(
            layer, query[:, own], keys[:, first:end], values[:, first:end], scale
        )
        return output

    return attend


def expected() -> int:
    """Return how many processes torchrun has started to share a model; 1 without torchrun."""
    # Other programs set WORLD_SIZE too, for purposes of their own.
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def leads() -> bool:
    """Whether this process is the first of them, or alone."""
    return expected() == 1 or int(os.environ["RANK"]) == 0


def leave() -> None:
    """Part from the other processes, all of which must do so; this one is alone afterwards."""
    dist.destroy_process_group()
