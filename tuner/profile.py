"""The separable profile: what every head would lose at every alpha, each by itself, from one look.

Owns the figures by which a head's loss is weighed, and the settings that follow from each. Heads of
one layer do not influence each other within it, so that one walk over a layer's attention rows with
all heads at one alpha tells of each of them; what a change of one does to the layers above enters
only through gradients. So a profile is a prior for a search, and what follows from it is measured
like anything else. Knows nothing of the other stages of a search.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from a2sf import teacher
from a2sf.models import LoadedModel
from a2sf.teacher import Example
from tuner.masked import SAMPLES, gradients, walked
from tuner.objective import effective
from tuner.search import Alphas, Frame, Setting
from tuner.trials import Trials, Tried

ALPHAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)

WEIGHTINGS = (
    "output_error",
    "fisher",
    "fisher_coherent",
    "first_order",
    "second_order",
    "future_mass",
)
"""How a head's loss is weighed: means over examples, summed over the query heads of its group.

With d(t) the attention output at position t less what the full cache gives on the same inputs, and
g(t) the gradient of the example's KL (nats, mean over its counted positions) with respect to it:

    output_error     mean over t of |d(t)|^2
    fisher           sum over t of (g(t) . d(t))^2, as if effects of unlike sign never cancelled
    fisher_coherent  (sum over t of g(t) . d(t))^2, where they do
    first_order      sum over t of g(t) . d(t), in nats: the predicted change of the KL itself
    second_order     first_order and half of c's curvature: c is the change from the base's output
    future_mass      mean over t of what the full row pays to tokens that are evicted by then

Each less its value at the base's alpha, so that lower is better and the base is 0. Errors are taken
against the full cache and not against the base, or no square could ever be less than the base's. t
runs over all tokens: a prompt in one block loses nothing, and one in several loses within itself.

Measured (packaged model, recall, 16 examples, ratio .2, around uniform .99, which costs 2.92 nats):
over 96 changes of single heads, second_order ranks as the changes cost with a Spearman correlation
of .71, output_error .32, the others below .25. All that second_order proposes together costs .44
nats less than the base (standard error .17), what any other proposes no less than the base.
"""

BATCH = 8
"""Examples profiled together."""

_OTHER_PASSES = 5 + 2 * SAMPLES
"""The full cache, the base, the pass that gradients flow through, and 2 for each gradient."""

WORK = float(_OTHER_PASSES + len(ALPHAS))
"""Of a profile, in passes over all examples and layers; walks over the rows counted as whole."""


@dataclass(frozen=True)
class Proposal:
    """A setting that follows from a profile."""

    setting: Setting
    origins: tuple[str, ...]
    """The weightings that lead to it; with `/half`, where only half of the heads follow them."""


@dataclass(frozen=True)
class Profile:
    """What each head alone would cost at each alpha of a grid, more than at the base's alpha."""

    base: Alphas
    alphas: tuple[float, ...]
    costs: Mapping[str, NDArray[np.float64]]
    """By weighting [num_layers, num_kv_heads, alphas], rounded to 6 significant digits."""
    evaluations: float
    """Work that it took, in passes over all examples and layers. A walk over the rows of all layers
    is counted as a whole pass."""

    def document(self) -> dict[str, Any]:
        """The profile as a JSON document."""
        return {
            "base": [list(row) for row in self.base],
            "alphas": list(self.alphas),
            "costs": {name: costs.tolist() for name, costs in self.costs.items()},
            "evaluations": self.evaluations,
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """The inverse of `document`."""
        return cls(
            base=tuple(tuple(row) for row in document["base"]),
            alphas=tuple(document["alphas"]),
            costs={name: np.array(costs) for name, costs in document["costs"].items()},
            evaluations=document["evaluations"],
        )

    def proposals(self, base: Setting) -> list[Proposal]:
        """Say what follows from each weighting, each setting once, without `base` itself.

        Of each weighting: every head at its cheapest alpha; and the half of all heads that gain
        most by that, the others as they are.
        """
        origins: dict[Setting, list[str]] = {}
        for name, costs in self.costs.items():
            gain = -costs.min(axis=-1)
            cheapest = np.take(self.alphas, costs.argmin(axis=-1))
            ranks = (-gain).argsort(axis=None, kind="stable").argsort().reshape(gain.shape)
            for origin, count in ((name, gain.size), (f"{name}/half", -(-gain.size // 2))):
                chosen = np.where((gain > 0) & (ranks < count), cheapest, base.alpha)
                setting = replace(base, alpha=tuple(map(tuple, chosen.tolist())))
                origins.setdefault(setting, []).append(origin)
        origins.pop(base, None)
        return [Proposal(setting, tuple(names)) for setting, names in origins.items()]


@dataclass(frozen=True)
class Found:
    """What a profile led to."""

    profile: Profile
    tried: tuple[tuple[Proposal, Tried], ...]
    """What each proposal cost: as many as there were trials left for."""
    best: Tried


def run(trials: Trials, best: Tried, load: Callable[[], LoadedModel]) -> Found | None:
    """Measure what a profile proposes, as a stage of a search; None where it cannot be afforded.

    Args:
        trials: measures.
        best: the best setting so far, of which the profile is taken.
        load: loads the trials' model with `pack=False`; called only if the profile is not known.
    """
    if not trials.affords(WORK):
        trials.notes.append(
            "The stage profile was left out: trials or time do not suffice for its first look."
        )
        return None
    point = json.dumps(best.setting.point(), sort_keys=True)
    name = f"profile {hashlib.sha256(point.encode()).hexdigest()[:16]}"

    def make() -> tuple[dict[str, Any], float]:
        made = profile(load(), trials.objective.examples, trials.frame, best.setting)
        return made.document(), made.evaluations

    known = Profile.of(trials.settled(name, make))
    proposals = known.proposals(best.setting)
    settings = [proposal.setting for proposal in proposals]
    # As many as the stage has trials left for.
    tried = tuple(zip(proposals, trials.measure(name, settings, best=best), strict=False))
    better = [one for _, one in tried if one.gain(best) > 0]
    return Found(known, tried, min(better, key=lambda one: one.mean, default=best))


def classes(known: Profile, count: int) -> list[list[int]]:
    """Sort heads into at most `count` classes of similar profiles: [num_layers][num_kv_heads].

    Alike are heads whose curves have one shape, whatever their size: each curve is divided by its
    largest value. Ward's clustering starts from no random centres, so there is no seed.
    """
    curves = []
    for costs in known.costs.values():
        size = np.abs(costs).max(axis=-1, keepdims=True)
        curves.append(costs / np.where(size > 0, size, 1.0))
    rows = np.concatenate(curves, axis=-1)
    heads = rows.reshape(-1, rows.shape[-1])
    if len(heads) == 1:
        return [[0]]
    found = fcluster(linkage(heads, method="ward"), count, criterion="maxclust") - 1
    return [[int(index) for index in row] for row in found.reshape(rows.shape[:2])]


def profile(
    model: LoadedModel,
    examples: Sequence[Example],
    frame: Frame,
    base: Setting,
    alphas: Sequence[float] = ALPHAS,
) -> Profile:
    """Profile every head at every alpha around `base`.

    Memory of a batch, at most: rows x layers x width x (width x H_kv bytes for which tokens were
    kept, and what a layer keeps for its gradients, about 8 hidden + 3 intermediate + 5 H_q D
    numbers), and for one layer at a time rows x H_kv x width^2 x 12 bytes.

    Args:
        model: loaded with `pack=False`.
        examples: what to take means over.
        frame: completes settings to policies.
        base: the setting to start from.
        alphas: the grid.
    """
    shape = model.shape
    figures = torch.zeros(
        len(alphas) + 1, len(WEIGHTINGS), shape.num_layers, shape.num_kv_heads, dtype=torch.float64
    )
    order = sorted(examples, key=lambda example: len(example.token_ids))
    for first in range(0, len(order), BATCH):
        batch = _Batch(model, order[first : first + BATCH], frame, base)
        for layer in range(shape.num_layers):
            for at, figure in enumerate(batch.figures(layer, alphas)):
                figures[at, :, layer] += figure.sum(dim=1).cpu()
    relative = (figures[1:] - figures[0]) / len(examples)
    return Profile(
        base=base.alpha,
        alphas=tuple(alphas),
        costs={
            name: _rounded(relative[:, number].permute(1, 2, 0).numpy())
            for number, name in enumerate(WEIGHTINGS)
        },
        evaluations=float(_OTHER_PASSES + len(alphas)),
    )


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    rounded = [float(f"{value:.6g}") for value in values.flat]
    return np.array(rounded).reshape(values.shape)


class _Batch:
    """Some examples under the base, and the gradients there."""

    def __init__(
        self, model: LoadedModel, examples: Sequence[Example], frame: Frame, base: Setting
    ) -> None:
        self._model, self._examples = model, examples
        self._policies = [
            effective(frame.policy(base), model, len(example.token_ids)) for example in examples
        ]
        self._seen = walked(model, examples, self._policies)
        self._gradients = gradients(model, examples, self._seen)
        lengths = torch.tensor([len(example.token_ids) for example in examples])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        self._real = real.double().to(model.device)

    def figures(self, layer: int, alphas: Sequence[float]) -> Iterator[Tensor]:
        """Yield the weightings' figures of a layer under the base, then with all heads at each.

        Each is [weightings, rows, H_kv] float64.
        """
        seen = self._seen[layer]
        query, keys, values = seen.projected
        full = scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=seen.scale, enable_gqa=True
        )
        paid = _paid(query, keys, seen.scale)

        def weighed(output: Tensor, kept: Tensor) -> Tensor:
            return self._weighed(layer, output - full, output - seen.output, paid, kept)

        yield weighed(seen.output, seen.kept)
        for alpha in alphas:
            table = ((alpha,) * keys.shape[1],) * self._model.shape.num_layers
            policies = [policy.model_copy(update={"alpha": table}) for policy in self._policies]
            yield weighed(
                *teacher.walk(
                    self._model, self._examples, policies, layer, seen.projected, seen.scale
                )
            )

    def _weighed(
        self, layer: int, error: Tensor, change: Tensor, paid: Tensor, kept: Tensor
    ) -> Tensor:
        real = self._real[:, None]
        share = real / real.sum(dim=-1, keepdim=True)
        rows, kv_heads, width = kept.shape[:3]

        def grouped(values: Tensor) -> Tensor:
            """Sum over the group and D: [rows, H_kv, width]."""
            return values.double().sum(dim=-1).view(rows, kv_heads, -1, width).sum(dim=2)

        # No gradient reaches padding.
        effect = grouped(self._gradients.cost[layer] * error)
        scores = [grouped(draw[layer] * change).sum(dim=-1) for draw in self._gradients.scores]
        curvature = torch.stack(scores).square().mean(dim=0)
        lost = paid.masked_fill(kept, 0.0).sum(dim=-1, dtype=torch.float64)
        return torch.stack(
            [
                (grouped(error.square()) * share).sum(dim=-1),
                effect.square().sum(dim=-1),
                effect.sum(dim=-1).square(),
                effect.sum(dim=-1),
                effect.sum(dim=-1) + curvature / 2,
                (lost * share).sum(dim=-1),
            ]
        )


def _paid(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """What each query pays to each token before it with the full cache, summed over the group.

    [rows, H_kv, width, width], in float32 or float64; a row at a time, for heads come apart here.
    """
    kv_heads, width, dim = keys.shape[1:]
    later = torch.ones(width, width, dtype=torch.bool, device=keys.device).triu(1)
    precision = torch.promote_types(query.dtype, torch.float32)
    rows = []
    for q, k in zip(query, keys, strict=True):
        logits = q.view(kv_heads, -1, width, dim) @ k[:, None].transpose(-1, -2) * scale
        weights = logits.masked_fill(later, -torch.inf).softmax(dim=-1, dtype=precision)
        rows.append(weights.sum(dim=1))
    return torch.stack(rows)
