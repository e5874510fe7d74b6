"""Where trials are kept, so that a killed or shared search loses nothing but trials in flight.

Owns opening the storage, the two studies of a fit (uniform settings, tables), the check that a
study was made for the same thing, and running until enough trials are finished. Knows nothing of
models: a trial's cost comes from a callable.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState, create_trial
from tqdm import tqdm

from a2sf.errors import InvalidArgument
from a2sf.schema import TablePolicy
from tuner.objective import Cost
from tuner.search import (
    LOG_TAU_MAX,
    Alphas,
    Climb,
    Frame,
    Uniform,
    alphas_of,
    params_of,
    space,
)

DEFINITION = "a2sf.definition"
UNIFORM = "a2sf.uniform"

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

CHUNK = 8
"""Examples between two looks at whether a table is still worth the rest."""

_UNIFORM_SPACE: dict[str, Any] = {
    "alpha": FloatDistribution(0.0, 1.0),
    "recent_share": FloatDistribution(0.0, 1.0),
    "sinks": IntDistribution(0, 2**20),
    "examples": IntDistribution(1, 2**30),
}


def open_storage(url: str | None, journal: Path) -> tuple[BaseStorage, str]:
    """Open the storage at `url`, or the journal file, and say of which kind it is.

    Raises InvalidArgument where it cannot be opened; the message leaves the address out, since an
    address may hold a password.
    """
    # Libraries and drivers raise errors of their own, assertions among them, on what they cannot
    # read; none of them is this program's fault.
    if url is None:
        try:
            # Absolute: the lock is a link to the file, and a relative one would lead nowhere.
            return JournalStorage(JournalFileBackend(str(journal.resolve()))), "journal"
        except Exception as error:
            raise InvalidArgument(
                "storage",
                f"{journal} is not a whole journal ({type(error).__name__}: {error}); move it "
                "away, or use another --out",
            ) from error
    kind = url.split(":", 1)[0]
    try:
        return RDBStorage(url), kind
    except Exception as error:
        raise InvalidArgument(
            "storage",
            f"the {kind!r} storage cannot be opened ({type(error).__name__}); accepted: a URL such "
            "as sqlite:///file.db or postgresql://user@host/name, or nothing for a journal file",
        ) from error


class Fit:
    """The two studies of one fit: `NAME.uniform` for stage one, `NAME` for the tables."""

    def __init__(
        self, storage: BaseStorage, name: str, frame: Frame, definition: Mapping[str, Any]
    ) -> None:
        """Create or continue the studies; InvalidArgument if they are of another fit."""
        self.name = name
        self.frame = frame
        sampler = Climb(frame.num_layers, frame.num_kv_heads, int(definition["seed"]))
        self.sampler = sampler.name
        self._uniform = optuna.create_study(
            storage=storage, study_name=f"{name}.uniform", load_if_exists=True
        )
        self._tables = optuna.create_study(
            storage=storage,
            study_name=name,
            load_if_exists=True,
            sampler=sampler,
            pruner=_pruner(),
        )
        for study in (self._tables, self._uniform):
            _claim(study, definition)

    # Stage one -------------------------------------------------------------------------------

    @property
    def uniform(self) -> tuple[Uniform, Cost] | None:
        """The best uniform setting and its cost on all examples, once that was settled."""
        kept = self._tables.user_attrs.get(UNIFORM)
        if kept is None:
            return None
        return Uniform(**kept["setting"]), _restored(kept)

    def settle(self, setting: Uniform, cost: Cost) -> None:
        """Keep the outcome of stage one: the tables' start, whatever effort is asked for later."""
        kept = {"setting": vars(setting), **_stored(cost)}
        self._tables.set_user_attr(UNIFORM, kept)

    def measured(
        self, settings: Sequence[Uniform], examples: int, measure: Callable[..., Iterable[Cost]]
    ) -> Iterator[Cost]:
        """Yield the settings' costs on the first `examples` examples; measure only new ones."""
        known = {
            _key(trial.params): _restored(trial.user_attrs)
            for trial in self._uniform.get_trials(deepcopy=False)
        }
        params = [{**vars(setting), "examples": examples} for setting in settings]
        new = [s for s, p in zip(settings, params, strict=True) if _key(p) not in known]
        fresh = iter(measure(new))
        for setting in params:
            if _key(setting) not in known:
                began = time.perf_counter()
                cost = next(fresh)
                seconds = time.perf_counter() - began
                self._uniform.add_trial(
                    create_trial(
                        params=setting,
                        distributions=_UNIFORM_SPACE,
                        value=cost.mean,
                        user_attrs={**_stored(cost), "seconds": seconds},
                    )
                )
                known[_key(setting)] = cost
            yield known[_key(setting)]

    # Tables ----------------------------------------------------------------------------------

    @property
    def finished(self) -> int:
        """Tables tried so far, the start and those given up early included."""
        return len(self._tables.get_trials(deepcopy=False, states=FINISHED))

    def best(self) -> tuple[Alphas, float]:
        """The cheapest table on all examples and its mean KL in nats."""
        trial = self._tables.best_trial
        assert trial.value is not None
        return alphas_of(trial.params, self.frame.num_layers, self.frame.num_kv_heads), trial.value

    def run(
        self, trials: int, examples: int, measure: Callable[[TablePolicy, range], Cost]
    ) -> None:
        """Try tables until `trials` are finished, over all workers and runs of this study.

        A table is measured a few examples at a time and given up once a signed-rank test on the
        examples so far finds it worse than the best. Needs the outcome of stage one.
        """
        assert self.uniform is not None
        setting, start = self.uniform
        if self.finished == 0 and trials > 0:
            alpha = self.frame.uniform(setting).alpha
            self._tables.add_trial(
                create_trial(
                    params=params_of(alpha),
                    distributions=space(self.frame.num_layers, self.frame.num_kv_heads),
                    value=start.mean,
                    intermediate_values=dict(enumerate(start.kl.tolist())),
                )
            )
        if self.finished >= trials:
            return

        def cost_of(trial: optuna.Trial) -> float:
            drawn = {
                name: trial.suggest_float(name, 0.0, LOG_TAU_MAX)
                for name in space(self.frame.num_layers, self.frame.num_kv_heads)
            }
            alpha = alphas_of(drawn, self.frame.num_layers, self.frame.num_kv_heads)
            table = self.frame.table(alpha, recent_share=setting.recent_share, sinks=setting.sinks)
            values: list[float] = []
            for first in range(0, examples, CHUNK):
                part = range(first, min(first + CHUNK, examples))
                for step, kl in zip(part, measure(table, part).kl.tolist(), strict=True):
                    trial.report(kl, step)
                    values.append(kl)
                if len(values) < examples and trial.should_prune():
                    raise optuna.TrialPruned
            return float(np.mean(values))

        with tqdm(
            total=trials, initial=self.finished, desc="tables", unit="trial", leave=False
        ) as bar:

            def show(study: optuna.Study, _: FrozenTrial) -> None:
                bar.update(min(self.finished, trials) - bar.n)
                bar.set_postfix_str(f"best {study.best_value:.4f}, uniform {start.mean:.4f} nats")

            enough = MaxTrialsCallback(trials, states=FINISHED)
            self._tables.optimize(cost_of, callbacks=[show, enough])

    @property
    def seconds(self) -> float:
        """Time spent on measuring so far, summed over runs and workers."""
        grid = sum(t.user_attrs["seconds"] for t in self._uniform.get_trials(deepcopy=False))
        tables = self._tables.get_trials(deepcopy=False, states=FINISHED)
        return float(grid) + sum(t.duration.total_seconds() for t in tables if t.duration)


def _pruner() -> optuna.pruners.BasePruner:
    with warnings.catch_warnings():
        # Its interface may change in a later version, which the range in pyproject.toml is for.
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner(p_threshold=0.05, n_startup_steps=CHUNK)


def _claim(study: optuna.Study, definition: Mapping[str, Any]) -> None:
    kept = study.user_attrs.get(DEFINITION)
    if kept is None:
        study.set_user_attr(DEFINITION, dict(definition))
        return
    for key, value in definition.items():
        if kept.get(key) != value:
            raise InvalidArgument(
                "study",
                f"{study.study_name!r} in this storage was made for another fit: {key} is "
                f"{kept.get(key)!r} there and {value!r} here; give another --study or --out",
            )


def _key(params: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(params[name] for name in _UNIFORM_SPACE)


def _stored(cost: Cost) -> dict[str, list[float]]:
    return {"kl": cost.kl.tolist(), "nll": cost.nll.tolist()}


def _restored(kept: Mapping[str, Any]) -> Cost:
    return Cost(kl=np.array(kept["kl"]), nll=np.array(kept["nll"]))
