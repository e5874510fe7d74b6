"""The context of every part: the device, the sizes, the models, the report and its deadline.

Owns the sizes, real and dry. A dry run executes the same code on a processor, with sizes that give
no meaningful figures. Knows nothing of the parts.
"""

import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch

from a2sf.model.loader import LoadedModel
from benchmarks.gpu.models import DRY_SHAPES, SHAPES, build
from benchmarks.gpu.report import Deadline, Report


@dataclass(frozen=True)
class Cell:
    """Rows that decode together with filled caches."""

    model: str
    context: int
    """Tokens that a row has read."""
    batch: int
    budget: int
    peers: tuple[str, ...] = ("dynamic",)
    """Some of `full` (ours, all tokens kept), `dynamic` and `batching` (transformers)."""

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self.model}, {self.context} x {self.batch}, budget {self.budget}"


@dataclass(frozen=True)
class Texts:
    """Given texts that go through a layer, starting with empty slots."""

    rows: int
    tokens: int
    """Tokens of each text."""
    budget: int


@dataclass(frozen=True)
class Sizes:
    """Sizes and repetitions; the defaults are those of a real run."""

    rounds: int = 3
    """Turns of each variant of a cell."""
    untimed: int = 3
    """First steps of a turn, which are not timed."""
    steps: int = 12
    """Timed steps of a turn."""
    copied_bytes: int = 2**31
    """Bytes of the tensor that is copied to measure the bandwidth."""
    matmul: int = 8192
    cases: int = 200
    """Random decode steps to check; their rows have at most `case_slots` slots."""
    case_slots: int = 300
    chain: int = 300
    """Steps of the chain of evictions that is checked."""
    requests: int = 12
    """Random requests that the engine is checked with."""
    cells: tuple[Cell, ...] = (
        Cell("8b", 4096, 1, 1024, ("full", "dynamic", "batching")),
        Cell("8b", 16384, 1, 1024),
        Cell("8b", 32768, 1, 1024, ("full", "dynamic")),
        Cell("8b", 4096, 8, 1024, ("full", "dynamic", "batching")),
        Cell("8b", 16384, 8, 1024, ("dynamic", "batching")),
        Cell("8b", 32768, 8, 1024),
        Cell("8b", 4096, 32, 1024, ("dynamic", "batching")),
        Cell("8b", 16384, 32, 1024),
        Cell("8b", 16384, 32, 512, ()),
        Cell("8b", 16384, 32, 2048, ()),
        Cell("8b", 4096, 64, 1024),
        Cell("8b", 32768, 64, 1024, ()),
    )
    small_cells: tuple[Cell, ...] = (
        Cell("1b", 4096, 64, 1024, ("dynamic",)),
        Cell("1b", 32768, 8, 1024, ("full", "dynamic")),
    )
    worker_cell: Cell = Cell("8b", 4096, 8, 1024, ())
    """The cell measured in separate worker processes."""
    most_context: int = 32768
    """Context at which the most concurrent sequences are counted."""
    ceiling: int = 4096
    """Largest number of rows that the count of concurrent sequences tries."""
    lengths: tuple[int, ...] = (1200, 8192, 32768, 100_000)
    """Numbers of tokens read, for the comparison of step times by length."""
    batch: int = 64
    """Rows in measurements with only one number of rows."""
    prompt: int = 32768
    chunk: int = 512
    budget: int = 1024
    new_tokens: int = 1024
    """Tokens after the prompt."""
    short_prompt: int = 2048
    long_answer: int = 32768
    streams: int = 64
    stream_tokens: int = 256
    sequences: int = 32
    """Calibration sequences of the tuner."""
    sequence_tokens: int = 2048
    texts: tuple[Texts, ...] = (Texts(8, 512, 104), Texts(32, 2048, 1024))
    """Texts walked through a layer in one launch, and with one launch per token."""
    continuation: tuple[int, int] = (16, 48)
    """Two numbers of decode steps; a policy's forward pass is timed with each."""

    @property
    def room(self) -> int:
        """Slots besides the context for a row that keeps all tokens, in a cell."""
        steps = self.rounds * (self.untimed + self.steps) + 2
        # A multiple of the number that programs are compiled for, as contexts are.
        return -(-steps // 16) * 16


DRY = Sizes(
    rounds=2,
    untimed=1,
    steps=2,
    copied_bytes=2**16,
    matmul=32,
    cases=2,
    case_slots=16,
    chain=5,
    requests=2,
    cells=(Cell("8b", 40, 2, 16, ("full", "dynamic", "batching")), Cell("8b", 60, 2, 16)),
    small_cells=(Cell("1b", 40, 1, 16, ()),),
    worker_cell=Cell("8b", 40, 2, 16, ()),
    most_context=60,
    ceiling=3,
    lengths=(20, 60, 300),
    batch=2,
    prompt=48,
    chunk=16,
    budget=16,
    new_tokens=4,
    short_prompt=20,
    long_answer=60,
    streams=2,
    stream_tokens=6,
    sequences=2,
    sequence_tokens=48,
    texts=(Texts(2, 12, 5),),
    continuation=(2, 6),
)


@dataclass
class Run:
    """One run of the command."""

    device: torch.device
    report: Report
    dry: bool
    deadline: Deadline
    """The deadline of the running part."""
    peer_python: Path | None = None
    sizes: Sizes = field(default_factory=Sizes)
    bytes_per_s: float | None = None
    """Speed of copies on this device; None until measured."""
    _models: dict[str, LoadedModel] = field(default_factory=dict)

    def model(self, name: str) -> LoadedModel:
        """A model of a named shape, made on first use; one is kept at a time."""
        if name not in self._models:
            self._models.clear()
            self.free()
            shapes = DRY_SHAPES if self.dry else SHAPES
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
            self._models[name] = build(shapes[name], self.device, dtype)
        return self._models[name]

    def free(self) -> None:
        """Return unused memory to the device."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
