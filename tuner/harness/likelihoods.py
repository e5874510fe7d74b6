"""Log-likelihoods for the harness: which sequences share a pass, and the answer of each.

Owns the size of a pass. Knows nothing of the harness's requests.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from a2sf.offline.teacher_forcing import Example

_MAX_LOGITS = 2**28
"""Largest number of logits of one pass, so that long texts share a pass with fewer others."""


def example_of(tokens: tuple[int, ...], continuation: int) -> Example:
    """The sequence to run for tokens whose last `continuation` ones are to be predicted."""
    prompt = len(tokens) - continuation
    return Example(
        token_ids=tokens[:-1],
        prompt_tokens=prompt,
        counted=tuple(range(prompt - 1, len(tokens) - 1)),
    )


def passes(
    examples: Iterable[Example], batch_size: int, vocabulary: int
) -> Iterator[list[Example]]:
    """Group examples into passes, longest first, so that lack of memory shows at the start."""
    part: list[Example] = []
    logits = 0
    for example in sorted(examples, key=lambda e: len(e.token_ids), reverse=True):
        own = len(example.counted) * vocabulary
        if part and (len(part) == batch_size or logits + own > _MAX_LOGITS):
            yield part
            part, logits = [], 0
        part.append(example)
        logits += own
    if part:
        yield part


def answer(log_p: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-probability of a continuation, in nats, and whether it is the greedy one.

    `log_p` is [positions, vocab]; its last positions predict the continuation.
    """
    targets = torch.tensor(continuation, device=log_p.device)
    own = log_p.gather(1, targets[:, None]).double()
    return float(own.sum()), bool((log_p.argmax(dim=-1) == targets).all())
