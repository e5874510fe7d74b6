"""The training loop: curriculum, optimisers, checkpoints, and the log of exact answers.

Owns the optimisation only; batches come from ``training.data`` and numbers from
``training.config``. A checkpoint holds everything that a resumed run needs to continue exactly.

Usage: ``python -m training.train --data-dir DIR --out DIR --total-tokens N [--resume]``
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional

from training.config import RECIPES, Recipe
from training.corpus import default_data_dir
from training.data import Batch, Mixture
from training.model import build_model

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
SMOOTHING = 0.95


@dataclass
class Progress:
    """Where a run stands; ``exact`` is the smoothed share of exact answer tokens by task."""

    step: int = 0
    tokens: int = 0
    stage: int = 0
    stage_tokens: int = 0
    exact: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


class Trainer:
    """One run. ``total_tokens`` fixes the end of the learning rate's decay."""

    def __init__(
        self,
        recipe: Recipe,
        mixture: Mixture,
        *,
        total_tokens: int,
        device: str = "cpu",
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.mixture = mixture
        self.total_tokens = total_tokens
        self.device = device
        self.model = build_model(recipe.shape).to(device)
        self.progress = Progress()
        if compiled:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=recipe.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._base_lr = [recipe.matrix_lr, recipe.vector_lr]

    def step(self) -> dict[str, Any]:
        """One optimiser step; returns the figures of this batch for the log."""
        progress, stage = self.progress, self.recipe.stages[self.progress.stage]
        batch = self.mixture.batch(stage, progress.step)
        factor = self._lr_factor()
        for optimizer, base in zip(self.optimizers, self._base_lr, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
        loss, hits = self._loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for index, name in enumerate(stage.mixture):
            if index in hits:
                before = progress.exact.get(name, hits[index])
                progress.exact[name] = SMOOTHING * before + (1 - SMOOTHING) * hits[index]
        progress.step += 1
        progress.tokens += batch.inputs.numel()
        progress.stage_tokens += batch.inputs.numel()
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "stage": stage.name,
            "loss": round(loss.item(), 4),
            "exact": {name: round(value, 4) for name, value in progress.exact.items()},
        }
        self._maybe_advance()
        return record

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, dict[int, float]]:
        """Weighted mean cross-entropy, and the share of right answer tokens by mixture index."""
        inputs = batch.inputs.to(self.device)
        counted = (batch.weights > 0).reshape(-1).nonzero().squeeze(1)
        targets = batch.targets.reshape(-1)[counted].to(self.device)
        weights = batch.weights.reshape(-1)[counted].to(self.device)
        source = batch.source.reshape(-1)[counted]
        with torch.autocast(self.device, dtype=torch.bfloat16):
            hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden.flatten(0, 1)[counted.to(self.device)])
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        right = (logits.detach().argmax(-1) == targets).cpu()
        hits = {
            index: right[source == index].float().mean().item()
            for index in set(source.tolist()) - {-1}
        }
        return (losses * weights).sum() / weights.sum(), hits

    def _lr_factor(self) -> float:
        """Linear warm-up, constant, then linear to zero over the last ``decay_share`` of tokens."""
        warm = min(1.0, (self.progress.step + 1) / self.recipe.warmup_steps)
        left = 1 - self.progress.tokens / self.total_tokens
        return min(warm, max(0.0, left / self.recipe.decay_share))

    def _maybe_advance(self) -> None:
        progress, stages = self.progress, self.recipe.stages
        if progress.stage + 1 == len(stages):
            return
        stage = stages[progress.stage]
        seen = [progress.exact[name] for name in stage.mixture if name in progress.exact]
        long_enough = progress.stage_tokens >= 40 * stage.batch_tokens
        solved = long_enough and min(seen, default=0.0) >= stage.advance_at
        if solved or progress.stage_tokens >= stage.max_tokens:
            progress.stage += 1
            progress.stage_tokens = 0
            progress.exact.clear()

    def save(self, folder: Path) -> None:
        """Write the checkpoint to a temporary name and rename it."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": dataclasses.asdict(self.progress),
            "shape": dataclasses.asdict(self.recipe.shape),
        }
        temporary = folder / f"{CHECKPOINT}.tmp"
        torch.save(state, temporary)
        temporary.replace(folder / CHECKPOINT)

    def load(self, folder: Path) -> None:
        """Continue where :meth:`save` stopped."""
        state = torch.load(folder / CHECKPOINT, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])


def main() -> None:
    """Train the reference model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="reference")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path("a2sf/reference/tokenizer.json"))
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and log")
    parser.add_argument("--total-tokens", type=int, default=20_000_000)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--save-every-s", type=float, default=120.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = RECIPES[args.recipe]
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    mixture = Mixture(tokenizer, args.data_dir or default_data_dir(), seed=recipe.seed)
    trainer = Trainer(
        recipe, mixture, total_tokens=args.total_tokens, device=device, compiled=args.compile
    )
    if args.resume:
        trainer.load(args.out)
    run(trainer, args.out, save_every_s=args.save_every_s)


def run(trainer: Trainer, out: Path, *, save_every_s: float) -> None:
    """Step until the tokens are spent; log every 20 steps, save now and then and at the end."""
    out.mkdir(parents=True, exist_ok=True)
    before, began, saved = trainer.progress.seconds, time.monotonic(), time.monotonic()
    with (out / LOG).open("a", encoding="utf-8") as log:
        while trainer.progress.tokens < trainer.total_tokens:
            record = trainer.step()
            now = time.monotonic()
            trainer.progress.seconds = before + now - began
            if trainer.progress.step % 20 == 0:
                record["seconds"] = round(trainer.progress.seconds, 1)
                print(json.dumps(record), file=log, flush=True)
            if now - saved >= save_every_s:
                trainer.save(out)
                saved = now
    trainer.save(out)


if __name__ == "__main__":
    main()
