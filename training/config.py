"""The recipe as data: the model's shape, the optimiser's numbers and the curriculum.

Knows no torch. A stage is left when its tasks are solved (``advance_at``) or its tokens are spent;
the last stage takes what remains of the run's tokens and carries the decay of the learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """Arguments of ``LlamaConfig``; see the model card for the parameter count."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 688
    max_position_embeddings: int = 1024


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    Every batch draws the length of its rows from ``lengths`` and fills them with documents; a
    generated document has between ``document_tokens[0]`` and ``[1]`` tokens, at most a row.
    ``mixture`` gives each source's share of documents: generated tasks by name (as ``recall/FORM``
    and ``state/FORM`` where there are forms) and sources of text. Tokens of a generated document
    that are no answer count ``context_weight`` in the loss, answers 1.
    """

    name: str
    lengths: tuple[int, ...]
    document_tokens: tuple[int, int]
    mixture: dict[str, float]
    advance_at: float = 0.85
    max_tokens: int = 6_000_000
    batch_tokens: int = 4096
    context_weight: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, except the data and the machine's arithmetic."""

    stages: tuple[Stage, ...]
    shape: Shape = field(default_factory=Shape)
    matrix_lr: float = 0.007
    vector_lr: float = 0.003
    warmup_steps: int = 50
    decay_share: float = 0.3
    seed: int = 0


TEXT = {
    "stories": 0.09,
    "wikipedia": 0.05,
    "shakespeare": 0.02,
    "wikitext2": 0.03,
    "mathqa": 0.15,
    "gsm8k": 0.12,
    "openbookqa": 0.04,
    "winogrande": 0.02,
    "piqa": 0.02,
    "copa": 0.01,
    "arc_easy": 0.04,
    "arc_challenge": 0.03,
}

REFERENCE = Recipe(
    stages=(
        Stage("bare-24", (64,), (14, 30), {"recall/list": 0.7, "copy": 0.3}, batch_tokens=2048),
        Stage(
            "bare-64",
            (64,),
            (20, 64),
            {"recall/list": 0.6, "copy": 0.2, "recall/sentence": 0.2},
            batch_tokens=2048,
        ),
        Stage(
            "bare-128",
            (128,),
            (32, 128),
            {"recall/list": 0.2, "copy": 0.1, "recall/sentence": 0.2, "recall/pair": 0.5},
            batch_tokens=2048,
        ),
        Stage(
            "sentences-256",
            (256,),
            (48, 256),
            {
                "recall/list": 0.15,
                "copy": 0.1,
                "recall/sentence": 0.25,
                "recall/pair": 0.3,
                "recall/story": 0.2,
            },
        ),
        Stage(
            "sentences-512",
            (512,),
            (64, 512),
            {
                "recall/list": 0.1,
                "copy": 0.05,
                "recall/sentence": 0.25,
                "recall/pair": 0.3,
                "recall/story": 0.2,
                "state/value": 0.1,
            },
            max_tokens=250_000,
        ),
        Stage(
            "sums-128",
            (128,),
            (24, 128),
            {
                "arith": 0.4,
                "state/counter": 0.25,
                "state/value": 0.15,
                "recall/sentence": 0.05,
                "recall/pair": 0.15,
            },
            max_tokens=2_000_000,
        ),
        Stage(
            "states-128",
            (128,),
            (24, 128),
            {
                "state/held": 0.4,
                "state/counter": 0.35,
                "state/value": 0.1,
                "arith": 0.05,
                "recall/pair": 0.1,
            },
            max_tokens=1_200_000,
        ),
        Stage(
            "all-1024",
            (256, 512, 1024),
            (64, 1024),
            {
                "recall/list": 0.02,
                "copy": 0.02,
                "recall/sentence": 0.05,
                "recall/pair": 0.06,
                "recall/story": 0.05,
                "recall/talk": 0.03,
                "state/value": 0.03,
                "state/held": 0.04,
                "state/counter": 0.05,
                "arith": 0.05,
                **TEXT,
            },
            context_weight=0.1,
        ),
    )
)

TINY = Recipe(
    shape=Shape(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
    ),
    stages=(Stage("tiny", (32,), (14, 30), {"recall/list": 0.7, "copy": 0.3}, batch_tokens=256),),
    warmup_steps=5,
)
"""For tests: learns the form of the answers within a hundred steps."""

RECIPES: dict[str, Recipe] = {
    "reference": REFERENCE,
    "tiny": TINY,
}
