"""Random logits, settings and rows for the tests of sampling."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from a2sf.engine import sampling
from a2sf.requests import Sampling

CPU = torch.device("cpu")
VOCAB = 32

# Each is off in about half of the rows, so that every filter is also tested alone.
requested_settings = st.builds(
    Sampling,
    repetition_penalty=st.just(1.0) | st.floats(0.3, 3.0),
    temperature=st.just(1.0) | st.floats(0.2, 3.0),
    top_k=st.just(0) | st.integers(1, 40),
    top_p=st.just(1.0) | st.floats(0.05, 0.99),
    min_p=st.just(0.0) | st.floats(0.01, 0.9),
)
greedy_settings = st.builds(
    Sampling,
    repetition_penalty=st.just(1.0) | st.floats(0.3, 3.0),
    temperature=st.just(0.0),
    top_k=st.integers(0, 5),
)
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def row(
    requested: Sampling, prompt_ids: list[int] | None = None, **fields: Any
) -> sampling.SamplingState:
    settings = {"seed": 0, "vocab_size": VOCAB, "device": CPU, **fields}
    return sampling.SamplingState.start(requested, prompt_ids=prompt_ids or [0], **settings)


def probabilities(logits: Tensor, requested: Sampling) -> Tensor:
    return sampling.Batch([row(requested, vocab_size=len(logits))], CPU).probabilities(
        logits[None]
    )[0]
