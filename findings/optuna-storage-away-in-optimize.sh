#!/usr/bin/env bash
# What people assume: when the storage of a study goes away while `study.optimize()` runs, the error
#   that reaches the caller is the storage's own, so that it can be told from a fault of the program.
# What happens: after the objective has returned, `optimize()` asks the storage for the trial once
#   more while it handles the first error, and what comes out is an error of that second call, or an
#   UnboundLocalError of Optuna's own code, whose cause has to be looked for.
# What to do: see what is raised in the whole chain of causes; or call the storage by `ask` and
#   `tell`, whose errors are the storage's.
# Versions: optuna 5.0.0. Date: 2026-11-30. Exits 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check optuna==5.0.0
cd "$work"

"$work/venv/bin/python" - <<'PYTHON'
import sys

import optuna
from optuna.storages import InMemoryStorage

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Leaving(InMemoryStorage):
    """A storage that is away from a moment on."""

    away = False

    def __getattribute__(self, name):
        public = not name.startswith("_")
        if public and name != "away" and self.away:
            raise ConnectionRefusedError("the storage is away")
        return super().__getattribute__(name)


def objective(trial):
    trial.suggest_float("x", 0.0, 1.0)
    storage.away = True
    return 0.0


storage = Leaving()
study = optuna.create_study(storage=storage)
try:
    study.optimize(objective, n_trials=1)
    by_optimize = None
except BaseException as error:
    by_optimize = error

storage = Leaving()
study = optuna.create_study(storage=storage)
trial = study.ask()
try:
    study.tell(trial, objective(trial))
    by_tell = None
except BaseException as error:
    by_tell = error

print(f"optuna {optuna.__version__}: the storage goes away while the objective runs")
print(f"optimize() raises {by_optimize!r}")
print(f"tell() raises     {by_tell!r}")
sys.exit(0 if isinstance(by_optimize, UnboundLocalError) else 1)
PYTHON
