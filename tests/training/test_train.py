"""Training: batches repeat by step, the loss falls, and a resumed run continues exactly."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from a2sf import reference
from training.config import REFERENCE, TINY
from training.data import BOS_ID, EOS_ID, Mixture, episode_of
from training.export import export
from training.train import Trainer
from tuner.data.generated import RECALL_FORMS, STATE_FORMS

TOKENIZER = Tokenizer.from_file(str(reference.path() / "tokenizer.json"))


def trainer(total_tokens: int) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(TINY, Mixture(TOKENIZER, None, seed=TINY.seed), total_tokens=total_tokens)


def test_a_batch_is_decided_by_its_step() -> None:
    mixture = Mixture(TOKENIZER, None, seed=0)
    stage = REFERENCE.stages[2]
    first, again, other = (mixture.batch(stage, step) for step in (4, 4, 5))
    length = stage.lengths[0]
    assert first.inputs.shape == (stage.batch_tokens // length, length)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.inputs, other.inputs)


def test_pieces_tokenize_as_the_whole_document_does() -> None:
    mixture = Mixture(TOKENIZER, None, seed=0)
    tasks = ["copy", "arith"]
    tasks += [f"recall/{form}" for form in RECALL_FORMS] + [f"state/{form}" for form in STATE_FORMS]
    assert set(tasks) <= set(REFERENCE.stages[-1].mixture)
    for task in tasks:
        episode = episode_of(Random(task), task, 200)
        text = episode.context + "".join(q + a for q, a in episode.turns)
        document = mixture.weigh(episode, context_weight=0.0)
        whole = TOKENIZER.encode(text, add_special_tokens=False).ids
        assert document.ids == [BOS_ID, *whole, EOS_ID]
        answers = [i for i, mine in zip(document.ids, document.answer, strict=True) if mine]
        assert TOKENIZER.decode(answers) == "".join(answer for _, answer in episode.turns)


def test_an_export_has_the_weights_of_the_checkpoint_in_bfloat16(tmp_path: Path) -> None:
    run = trainer(total_tokens=TINY.stages[0].batch_tokens)
    run.step()
    run.save(tmp_path)
    weights = load_file(export(tmp_path, tmp_path / "release"))
    saved = run.model.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(tensor, saved[name].bfloat16()), name


@pytest.mark.slow
def test_a_hundred_steps_lower_the_loss() -> None:
    run = trainer(total_tokens=100 * TINY.stages[0].batch_tokens)
    losses = [run.step()["loss"] for _ in range(100)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.slow
def test_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    whole = trainer(total_tokens=30 * TINY.stages[0].batch_tokens)
    for _ in range(15):
        whole.step()
    whole.save(tmp_path)
    resumed = trainer(total_tokens=30 * TINY.stages[0].batch_tokens)
    resumed.load(tmp_path)
    assert [whole.step() for _ in range(15)] == [resumed.step() for _ in range(15)]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
