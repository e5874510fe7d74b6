#!/usr/bin/env bash
# What people assume: while a study's database is unavailable, every call of the storage raises its
#   error at once, so a caller can say so, wait, and try again by its own rules.
# What happens: `create_new_trial` of a database's storage catches the error itself. It tries five
#   times, with random pauses of up to two seconds between them, and logs nothing. The retries are
#   meant for deadlocks, but the same error class also means "unavailable". All other calls raise at
#   once. So a worker that asks for a trial stays silent for some seconds longer than the others, and
#   a caller's own retries multiply by five.
# What to do: give a wait for a database more time than its own pauses add up to, and do not take
#   silence of some seconds for a working database.
# Versions: optuna 5.0.0. Date: 2026-11-30. Exits 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check optuna==5.0.0
cd "$work"

"$work/venv/bin/python" - <<'PYTHON'
import sqlite3
import sys
import time

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage

records = []
optuna.logging.disable_default_handler()
optuna.logging.get_logger("optuna").addFilter(lambda record: records.append(record) or True)

storage = RDBStorage("sqlite:///study.db", engine_kwargs={"connect_args": {"timeout": 0.01}})
study = optuna.create_study(storage=storage)
locked = sqlite3.connect("study.db", isolation_level=None)
locked.execute("BEGIN EXCLUSIVE")  # another process has the database for itself

pauses = []
time.sleep = pauses.append


def outcome(call, *arguments):
    pauses.clear()
    try:
        call(*arguments)
    except StorageInternalError as error:
        return f"{type(error.__cause__).__name__} after {len(pauses)} pauses"
    return "no error"


created = outcome(storage.create_new_trial, study._study_id)
noted = outcome(study.set_user_attr, "key", 1)
print(f"optuna {optuna.__version__}: the database is locked by another process")
print(f"storage.create_new_trial(): {created}, {len(records)} lines in the log")
print(f"study.set_user_attr():      {noted}")
expected = ("OperationalError after 4 pauses", "OperationalError after 0 pauses")
sys.exit(0 if (created, noted) == expected else 1)
PYTHON
