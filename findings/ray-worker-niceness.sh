#!/usr/bin/env bash
# What people assume: what runs in a Ray actor or a Ray Serve replica competes for processors like the
#   program that started it.
# What happens: Ray starts its workers at niceness 15. Beside ordinary work that keeps all cores busy,
#   a worker gets a few hundredths of a core: latency of replicas is many times what it is alone, and
#   Serve kills proxies that are not ready in time, starts others, and gives up.
# What to do: set RAY_worker_niceness=0 in the environment before a node is started.
# Versions: ray 2.60.0. Date: 2026-11-30. Exits 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
cd "$work"
export RAY_USAGE_STATS_ENABLED=0

look() {
  "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import os

import ray

ray.init("local", include_dashboard=False, num_cpus=1, object_store_memory=80 * 2**20)


@ray.remote
def niceness():
    return os.nice(0)


print(ray.__version__, os.nice(0), ray.get(niceness.remote()))
ray.shutdown()
PYTHON
}

read -r version own worker < <(look)
read -r _ _ told < <(RAY_worker_niceness=0 look)
echo "ray $version: the program runs at niceness $own, its worker at $worker"
echo "with RAY_worker_niceness=0 the worker runs at $told"
[ "$worker" -gt "$own" ] && [ "$told" -eq "$own" ]
