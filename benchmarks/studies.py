"""The studies of the findings: what is evaluated, and which question each study answers.

Owns the data sets, the policies and the sizes. Knows nothing of stored figures or of pages.
"""

from dataclasses import dataclass

from tuner.evaluate import EvaluationSettings, evaluate
from tuner.evaluation.results import Evaluation, Size

OTHERS = "full,window,h2o,tova_per_head,random,random:0"


FEW = ",".join(
    f"a2sf:{alpha}:{recent}" for alpha in ("0", ".5", ".9", ".99", "1") for recent in ("0", ".5")
)


GRID = ",".join(
    f"a2sf:{alpha}:{recent}"
    for alpha in ("0", ".5", ".9", ".95", ".98", ".99", "1")
    for recent in ("0", ".5")
)


TABLES = ",".join(f"benchmarks/tables/{name}.json" for name in ("recall", "state"))
"""Fitted by `make tables`; the figures call each by its own name."""


@dataclass(frozen=True)
class Study:
    """One evaluation; `question` is the question it answers."""

    name: str
    question: str
    datasets: tuple[str, ...]
    policies: str
    ratios: tuple[float, ...]
    examples: int
    length: int = 512
    shots: tuple[int | None, ...] = (None,)
    contrasts: tuple[tuple[str, str], ...] = ()
    """Pairs of policies whose difference was chosen for a test before the measurement."""

    def run(self) -> Evaluation:
        """Measure it on the shipped model."""
        return evaluate(
            EvaluationSettings(
                dataset=",".join(self.datasets),
                policies=self.policies,
                sizes=tuple(Size(ratio=ratio) for ratio in self.ratios),
                shots=self.shots,
                examples=self.examples,
                length=self.length,
                split="validation",
                prefill_chunk=None,
                seed=0,
                data_dir=None,
                model="reference",
                revision=None,
                device="cpu",
                dtype="float32",
                command=self.command,
            )
        )

    @property
    def command(self) -> str:
        """The equivalent command line."""
        shots = ",".join(str(n) for n in self.shots if n is not None)
        ratios = ",".join(f"{ratio:g}" for ratio in self.ratios)
        return (
            f"python -m tuner evaluate --dataset {','.join(self.datasets)} "
            f"--policies {self.policies} "
            + (f"--ratios {ratios} " if ratios else "")
            + (f"--shots {shots} " if shots else "")
            + f"--examples {self.examples} --length {self.length}"
        )


STUDIES = (
    Study(
        "card",
        "What can the model do with everything in view?",
        (
            *("recall", "recall_list", "recall_sentence", "recall_pair", "recall_story"),
            *("state", "state_value", "state_held", "state_counter", "arith", "copy"),
        ),
        "full",
        (),
        64,
    ),
    Study(
        "card-1024",
        "And at the end of its context?",
        ("recall", "recall_sentence", "recall_pair", "recall_story", "state", "arith"),
        "full",
        (),
        64,
        length=1024,
    ),
    Study(
        "ratios",
        "How does each policy fade as the budget shrinks?",
        ("recall",),
        "full,window,h2o,tova_per_head,random,a2sf:.99:0,a2sf:.9:.5,mathqa",
        (0.1, 0.2, 0.3, 0.4, 0.6, 0.8),
        32,
    ),
    Study(
        "recall",
        "What survives at a fifth, in a talk that returns to what it has asked for?",
        ("recall",),
        f"{OTHERS},{GRID},mathqa",
        (0.2,),
        64,
    ),
    Study(
        "tasks",
        "And on everything else?",
        (
            *("recall_story", "state", "arith", "mathqa", "gsm8k", "winogrande"),
            "wikitext2",
        ),
        f"{OTHERS},{FEW},mathqa",
        (0.2,),
        32,
    ),
    Study(
        "transfer",
        "What is a table worth on what it was not fitted to?",
        ("recall", "recall_story", "state", "arith", "mathqa", "wikitext2"),
        f"full,window,h2o,random,a2sf:.99:0,a2sf:0:0,a2sf:.9:.5,{TABLES},mathqa",
        (0.2,),
        32,
    ),
    Study(
        "transfer-budget",
        "What do tables keep at other budgets than the one that they were fitted at?",
        ("recall",),
        f"full,random,a2sf:.99:0,{TABLES}",
        (0.1, 0.15, 0.2, 0.3, 0.4),
        32,
    ),
    Study(
        "transfer-length",
        "And on sequences twice as long as those it was fitted to?",
        ("recall", "state"),
        f"full,random,a2sf:.99:0,a2sf:.995:0,a2sf:0:0,{TABLES}",
        (0.2,),
        32,
        length=1024,
    ),
    Study(
        "paper",
        "Does arithmetic want a high alpha and WinoGrande a low one, as the paper prunes?",
        ("mathqa", "winogrande"),
        "full,window:0,h2o:0,"
        + ",".join(f"a2sf:{a}:0:0" for a in ("0", ".1", ".3", ".5", ".7"))
        + ","
        + ",".join(f"a2sf:{a}:0:0" for a in (".9", ".95", ".98", ".99", "1")),
        (0.2,),
        96,
        length=256,
        shots=(0, 1),
        contrasts=(("a2sf:.9:0:0", "a2sf:.1:0:0"),),
    ),
)
