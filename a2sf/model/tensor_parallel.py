"""The processes (ranks) that share one model.

Owns the process group of torchrun's processes, the split of KV heads among them, and the transport
of messages from the first rank to the others. Knows nothing of models, requests or the messages'
content.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from a2sf.errors import InvalidArgument

LONGEST_STEP = timedelta(minutes=10)
"""Timeout for another rank during a computation."""

_LONGEST_IDLE = timedelta(days=365)
"""Idle broadcast timeout; a dead peer still fails at once."""


class RankLost(RuntimeError):
    """Another process that shares the model has ended, or has drawn other tokens."""


@dataclass(frozen=True)
class Ranks:
    """This process, as one of the processes that share a model."""

    rank: int
    size: int
    device: torch.device
    """The device of this process."""
    channel: dist.ProcessGroup | None = None
    """The process group for messages; None for a single rank."""

    @classmethod
    def join(cls, device: str) -> Self:
        """Join the other processes; returns after all have joined.

        `device` is the user's choice, as for `load_model`; each rank uses the device with its own
        number. Raises InvalidArgument for a device that this machine or torchrun rules out.
        """
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("auto", kind):
            raise InvalidArgument(
                "device",
                f"{device!r}; accepted under torchrun on this machine: auto, {kind}; each process "
                "takes the device with its own number",
            )
        place = torch.device(kind)
        if kind == "cuda":
            place = torch.device(kind, int(os.environ["LOCAL_RANK"]))
            if place.index >= torch.cuda.device_count():
                raise InvalidArgument(
                    "--nproc-per-node",
                    f"there is no CUDA device for process {place.index + 1}; accepted on this "
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
        """Return (first, end): of `num_kv_heads`, this rank holds first .. end - 1.

        Raises InvalidArgument if the heads cannot be divided evenly.
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

    def send(self, message: bytes) -> None:
        """Send a message from the first rank to all others. Raises RankLost if one has ended."""
        self._broadcast(torch.tensor([len(message)]))
        if message:
            self._broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8))

    def receive(self) -> bytes:
        """Wait for the first rank's next message, without a practical timeout.

        Raises RankLost if that rank has ended.
        """
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        message = torch.empty(int(length), dtype=torch.uint8)
        if len(message):
            self._broadcast(message)
        return message.numpy().tobytes()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Compute together with the other ranks. Raises RankLost if one ends meanwhile."""
        try:
            yield
        except RuntimeError as error:
            # NCCL raises a DistError, gloo a RuntimeError whose text names gloo's source file.
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.size} has lost another rank, which must have ended"
            ) from error

    def _broadcast(self, tensor: Tensor) -> None:
        with self.together():
            dist.broadcast(tensor, src=0, group=self.channel)


def num_processes() -> int:
    """Return the number of processes that torchrun started to share a model; 1 without torchrun."""
    # WORLD_SIZE alone proves nothing: other programs set it too.
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def is_first_rank() -> bool:
    """Whether this process is the first rank, or the only process."""
    return num_processes() == 1 or int(os.environ["RANK"]) == 0


def leave() -> None:
    """Leave the process group. All processes must call this."""
    dist.destroy_process_group()
