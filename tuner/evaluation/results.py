"""The results of an evaluation: the document of `evaluate --json`, shown by the HTML report.

Owns the fields and their units. Knows nothing of how the figures are measured or drawn.
"""

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from a2sf.schema import Count, Digest, Estimate, Finite, Frozen, Positive, Ratio, StoredIdentity

Metric = Literal["kl", "nll", "top1", "accuracy", "similarity"]

METRICS: dict[Metric, str] = {
    "kl": "KL(full cache || evicted cache) of the next-token distribution, nats at temperature 1",
    "nll": "negative log-likelihood of the true next token, nats",
    "top1": "share of positions where the likeliest token is the full cache's",
    "accuracy": "share of questions answered right",
    "similarity": "cosine between the attention row over the kept tokens and over all tokens",
}
"""Every figure is a mean over the counted positions (or the questions) of an example, then over
examples; intervals are bootstrapped over examples."""

SIGNIFICANT = 0.05
"""A corrected p-value below this is significant."""

Accuracy = Literal["likeliest choice", "exact greedy answer"]


class Size(Frozen):
    """The number of tokens that a head may keep: a share of each sequence's length, or a count."""

    ratio: Ratio | None = None
    slots: Positive | None = None

    def __str__(self) -> str:
        return f"ratio {self.ratio:g}" if self.ratio is not None else f"{self.slots} slots"


class Task(Frozen):
    """One dataset in one form, and the examples drawn from it."""

    name: str = Field(description="The dataset's name with its form, as in `mathqa, 1-shot`.")
    dataset: str
    split: str
    shots: Count | None = Field(
        description="Solved examples before each question; None where sequences are packed full."
    )
    prefill_chunk: Count = Field(description="For policies that set none; 0 is exact.")
    examples: Positive
    tokens: Positive = Field(description="Of all examples together.")
    counted: Positive = Field(description="Positions whose predictions were compared.")
    questions: Count = Field(description="The number of questions that `accuracy` is a share of.")
    accuracy: Accuracy | None = Field(description="How answers are judged; None if they are not.")
    data_sha256: Digest = Field(description="Over the token ids, prompts and counted positions.")


class Policy(Frozen):
    """One policy as the user named it."""

    name: str = Field(
        description="As written on the command line; for the file of a table, the table's name."
    )
    description: str
    alpha: tuple[tuple[Finite, ...], ...] | None = Field(
        default=None, description="[num_layers][num_kv_heads], for tables."
    )
    sha256: Digest | None = Field(default=None, description="For tables.")
    fitted_at: Size | None = Field(
        default=None, description="For tables: the size that they were fitted at."
    )


class Cell(Frozen):
    """One policy at one size on one task. `size` is None for the policy full, which has none."""

    task: str
    policy: str
    size: Size | None
    budget: float = Field(description="Mean slots over the examples.")
    kl: Estimate
    nll: Estimate
    top1: Estimate
    accuracy: Estimate | None
    similarity: Estimate
    similarity_by_head: tuple[tuple[Finite, ...], ...] = Field(
        description="[num_layers][num_kv_heads], mean over examples."
    )
    by_example: dict[Metric, tuple[Finite, ...]] = Field(
        description="The figures behind the estimates, one per example."
    )


class Comparison(Frozen):
    """Two policies on the same examples. The difference is policy minus baseline."""

    task: str
    size: Size
    metric: Metric
    policy: str
    baseline: str
    difference: Estimate
    p: Annotated[float, Field(ge=0, le=1)] = Field(
        description="Two-sided sign-flip test of a mean difference of zero."
    )
    p_holm: Annotated[float, Field(ge=0, le=1)] = Field(
        description="The same after Holm's correction over all comparisons of this task, size and "
        "metric."
    )


class Evaluation(Frozen):
    """The results of a whole run."""

    format: Literal[1] = 1
    created_at: AwareDatetime
    tool_version: str
    command: str = Field(description="The command line, without paths' directories.")
    machine: dict[str, str] = Field(description="Processor, device, threads, dtype, versions.")
    seconds: float
    model: StoredIdentity
    seed: int
    confidence: float
    tasks: tuple[Task, ...]
    policies: tuple[Policy, ...]
    cells: tuple[Cell, ...]
    comparisons: tuple[Comparison, ...]

    def cell(self, task: str, policy: str, size: Size | None) -> Cell | None:
        """Find one cell; the policy full is found at every size."""
        for cell in self.cells:
            if (cell.task, cell.policy) == (task, policy) and cell.size in (size, None):
                return cell
        return None

    def best_a2sf(self, task: str, size: Size) -> Cell | None:
        """Find the uniform alpha with the lowest KL among those tried."""
        found = [
            cell
            for cell in self.cells
            if (cell.task, cell.size) == (task, size) and cell.policy.startswith("a2sf:")
        ]
        return min(found, key=lambda cell: cell.kl.mean, default=None)

    def main_comparisons(self, task: str, size: Size) -> list[Comparison]:
        """Return the main comparisons of KL: those of the best a2sf, and of tables.

        The choice of the best of several is accounted for: Holm's correction counts all of them.
        """
        best = self.best_a2sf(task, size)
        chosen = {policy.name for policy in self.policies if policy.sha256}
        chosen |= {best.policy} if best else set()
        known = {"full", *chosen} | {
            policy.name for policy in self.policies if not policy.name.startswith("a2sf:")
        }
        return [
            comparison
            for comparison in self.comparisons
            if (comparison.task, comparison.size, comparison.metric) == (task, size, "kl")
            and comparison.policy in chosen
            and comparison.baseline in known
        ]
