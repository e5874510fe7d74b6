"""Times policies on given texts, compared with plain teacher forcing and with another build.

Owns one measurement: seconds that a model takes for a batch of texts, with the full cache in one
forward pass, and with an eviction for every token. Each build runs in a separate process. Variants
and builds alternate, round after round, and are compared within the run.

    python -m benchmarks.evaluation [--model DIR] [--against CHECKOUT] [--rounds 5]

Without --model: the packaged model, and the one that `make real-model` fetches, if present.
"""

import os
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer

from benchmarks import RESULTS, ROOT, passes, write
from benchmarks.peers.client import Client
from scripts.real_model import DIRECTORY as REAL
from tuner.evaluation import machine

HERE = "this build"
FILE = "benchmarks/passes.py"
"""Each build times itself, because interfaces move. A checkout from before this file needs a copy
of an early version of it."""
LONGEST_S = 1800.0


@dataclass(frozen=True)
class Texts:
    """The texts of a measurement."""

    prompt: int
    """Prompt tokens of each text."""
    batch: int
    """Texts per pass."""


PACKAGED = Texts(prompt=256, batch=32)
OTHERS = Texts(prompt=128, batch=8)


class Build:
    """A checkout of the project, this one or an earlier one, in a separate process."""

    def __init__(self, root: Path, log: Path, **load: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root)}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._client = Client([sys.executable, str(root / FILE)], environment, log)
        self.loaded = self._client.ask(LONGEST_S, do="load", **load)

    def run(self, kind: str) -> dict[str, Any]:
        """Run a pass; see `passes.Passes.run`."""
        return self._client.ask(LONGEST_S, do="run", kind=kind)

    def close(self) -> None:
        """End the process."""
        self._client.end()


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="reference, a directory or a hub id; several.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Checkout of another build, to alternate with.")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Variants to time beside plain teacher forcing.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float64.")] = "float32",
    length: Annotated[int, typer.Option(help="Tokens of every text.")] = 512,
    prompt: Annotated[
        int | None, typer.Option(help="Prompt tokens of every text; 256 for reference, else 128.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Texts per pass; 32 for reference, else 8.")
    ] = None,
    ratio: Annotated[float, typer.Option(help="Budget as a share of the length.")] = 0.2,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = os.cpu_count() or 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Directory of the JSON files.")] = RESULTS,
) -> None:
    """Time policies on given texts, in turns, and write the figures."""
    torch.set_num_threads(threads)
    found = model or ["reference", *([str(REAL)] if REAL.is_dir() else [])]
    builds = {HERE: ROOT, **({against.name: against} if against else {})}
    for one in found:
        usual = PACKAGED if one == "reference" else OTHERS
        settings = {
            "length": length,
            "prompt": prompt or usual.prompt,
            "batch": batch or usual.batch,
            "ratio": ratio,
        }
        with ExitStack() as stack:
            running = {
                name: stack.enter_context(
                    closing(
                        Build(
                            root.resolve(),
                            Path("build/evaluation.log"),
                            model=str(Path(one).resolve()) if Path(one).is_dir() else one,
                            **{"dtype": dtype, "device": device, "threads": threads, **settings},
                        )
                    )
                )
                for name, root in builds.items()
            }
            loaded = running[HERE].loaded
            wanted = {passes.PLAIN, *(variant or loaded["kinds"])}
            rows = compare(running, [k for k in loaded["kinds"] if k in wanted], rounds)
        times = machine.describe(torch.device(loaded["device"]), getattr(torch, loaded["dtype"]))
        name = "" if one == "reference" else f"{loaded['model']}-"
        kind = "cpu" if loaded["device"] == "cpu" else "gpu"
        write(
            out / f"evaluation-{name}{kind}.json",
            times,
            model=loaded["model"],
            **settings,
            rounds=rounds,
            rows=rows,
        )


def compare(running: dict[str, Any], kinds: list[str], rounds: int) -> list[dict[str, Any]]:
    """Alternate between kinds and builds, and summarise the times.

    Times are also given relative to plain passes of this build, and to the same kind in this build.

    Processor seconds are those used by the build's process. So they depend little on other work on
    the machine, but they do not show how well threads share the work.
    """
    times: dict[tuple[str, str], list[dict[str, Any]]] = {
        (k, b): [] for k in kinds for b in running
    }
    for turn in range(rounds + 1):
        for kind in kinds:
            # Alternate the order, so that no build always comes first.
            for build in list(running)[:: -1 if turn % 2 else 1]:
                found = running[build].run(kind)
                if turn:  # the first round is a warm-up
                    times[kind, build].append(found)
                typer.echo(f"{turn} {build}: {kind} {found['seconds']:.2f} s", err=True)
    rows = []
    for (kind, build), mine in times.items():
        row: dict[str, Any] = {"variant": kind, "build": build}
        for clock in ("seconds", "processor_seconds"):
            taken = [one[clock] for one in mine]
            low, median, high = numpy.percentile(taken, [25, 50, 75]).tolist()
            row[f"{clock}_median"] = round(median, 3)
            row[f"{clock}_quartiles"] = [round(low, 3), round(high, 3)]
            for name, other in (
                ("times_plain", times[passes.PLAIN, HERE]),
                ("times_this_build", times[kind, HERE]),
            ):
                base = float(numpy.median([one[clock] for one in other]))
                row[f"{clock}_{name}"] = round(median / base, 2)
        if mine[0]["found"] is not None:
            row["kl"] = mine[0]["found"]
        rows.append(row)
        typer.echo(
            f"{build:12s} {kind:38s} {row['seconds_median']:7.2f} s "
            f"{row['seconds_times_plain']:5.2f}x, of processors "
            f"{row['processor_seconds_median']:7.2f} s {row['processor_seconds_times_plain']:5.2f}x"
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
