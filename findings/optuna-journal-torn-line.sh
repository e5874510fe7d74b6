#!/usr/bin/env bash
# What people assume: a journal file whose writer was killed in the middle of a line loses that line
#   at most; what others write afterwards is safe.
# What happens: readers pass over the torn end, but the next writer appends to it. Its own record is
#   joined to the torn one, and from then on nobody can read the journal: every record behind it is
#   lost as well, and opening the study fails.
# What to do: cut the torn line off under the journal's lock before anything is appended.
# Versions: optuna 5.0.0. Date: 2026-11-30. Exits 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check optuna==5.0.0
cd "$work"

"$work/venv/bin/python" - <<'PYTHON'
import sys
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.set_verbosity(optuna.logging.ERROR)
path = Path("study.journal")


def study():
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.create_study(storage=storage, study_name="s", load_if_exists=True)


study().optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
whole = path.read_bytes()
path.write_bytes(whole[:-10])
print(f"optuna {optuna.__version__}: the last line of a journal is torn")
print("a reader sees", len(study().trials), "trials")
written = None
try:
    study().add_trial(optuna.trial.create_trial(value=1.0))
    print("the next writer appends without an error")
except Exception as error:
    written = error
    print(f"the next writer fails: {type(error).__name__}: {error}")
try:
    print("afterwards a reader sees", len(study().trials), "trials")
    broken = False
except Exception as error:
    print(f"afterwards a reader fails: {type(error).__name__}: {error}")
    broken = True
sys.exit(0 if broken else 1)
PYTHON
