"""Times passes on given texts, in a process of one build; called by `evaluation`.

Run as a file, with that build first on PYTHONPATH. Each command is a JSON line on stdin, each
answer a JSON line on stdout. Builds may differ in everything but these lines.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from a2sf.model.loader import load_model
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.policy import CachePolicy
from tuner.evaluation.objective import Objective, effective

PLAIN = "plain teacher forcing"
SEARCH = "a candidate of a search, with its KL"


class Passes:
    """A model, its texts, and the kinds of passes."""

    def __init__(
        self,
        model: str,
        dtype: str,
        device: str,
        threads: int,
        length: int,
        prompt: int,
        batch: int,
        ratio: float,
    ) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.model = load_model(model, device=device, dtype=dtype)
        ids = torch.randint(2, self.model.shape.vocab_size, (batch, length)).tolist()
        counted = tuple(range(prompt, length - 1))
        examples = [Example(tuple(row), prompt, counted) for row in ids]
        requested_policy = CachePolicy(alpha=0.9, budget_ratio=ratio, recent_share=0.5)
        whole, steps = (
            [
                effective(
                    requested_policy.model_copy(update={"prefill_chunk": chunk}), self.model, length
                )
            ]
            * batch
            for chunk in (0, 1)
        )
        objective = Objective(self.model, examples, label="benchmark")

        def predict(policies: Any, similarity: bool = False) -> None:
            teacher_forcing.predict(
                self.model, examples, policies, batch=batch, similarity=similarity
            )

        def search() -> float:
            return objective.cost(requested_policy).mean

        self.kinds: dict[str, Callable[[], float | None]] = {
            PLAIN: lambda: predict(None),
            "exact prefill, then step by step": lambda: predict(whole),
            "step by step from the first token": lambda: predict(steps),
            "the same, attention rows compared": lambda: predict(steps, similarity=True),
            SEARCH: search,
        }

    def run(self, kind: str) -> dict[str, Any]:
        """Seconds of a pass, processor seconds, and its result if that is a number."""
        start, used = time.perf_counter(), time.process_time()
        found = self.kinds[kind]()
        return {
            "seconds": time.perf_counter() - start,
            "processor_seconds": time.process_time() - used,
            "found": found,
        }


def main() -> None:
    """Answer commands until the end of the input."""
    passes: Passes | None = None
    for line in sys.stdin:
        command = json.loads(line)
        # Progress bars and libraries may print, so stdout is reserved for answers.
        with contextlib.redirect_stdout(sys.stderr):
            match command.pop("do"):
                case "load":
                    passes = Passes(**command)
                    answer = {
                        "model": passes.model.identity.id,
                        "dtype": str(passes.model.dtype).removeprefix("torch."),
                        "device": str(passes.model.device),
                        "kinds": list(passes.kinds),
                        "torch": version("torch"),
                    }
                case "run":
                    assert passes is not None
                    answer = passes.run(**command)
                case _:
                    return
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
