#!/usr/bin/env bash
# What people assume: a value that is enqueued is checked against the range that the objective asks
#   for, and one outside is refused or brought inside.
# What happens: Optuna warns, gives the objective the value as it is, and records it as the trial's
#   parameter, outside its own distribution. `study.best_params` may then be a point that the search
#   space does not have. Whoever hides warnings never learns of it.
# What to do: check values against their ranges before they are enqueued.
# Versions: optuna 5.0.0. Date: 2026-11-30. Exits 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check optuna==5.0.0
cd "$work"

"$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
seen = []


def objective(trial):
    seen.append(trial.suggest_float("x", 0.0, 1.0))
    return seen[-1]


study = optuna.create_study()
study.enqueue_trial({"x": -5.0})
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    study.optimize(objective, n_trials=1)
best = study.best_trial
print(f"optuna {optuna.__version__}: enqueued x = -5 for the range [0, 1]")
print(f"the objective got {seen[0]}; best_params is {best.params}; state {best.state.name}")
print("warnings:", [str(one.message) for one in told if "out of range" in str(one.message)])
print("recorded with", best.distributions["x"])
sys.exit(0 if seen == [-5.0] and study.best_params == {"x": -5.0} else 1)
PYTHON
