#!/usr/bin/env bash
# Start the service on the packaged model with its fitted table, stream one completion, stop it.
# DEMO_PYTHON says which Python to name for the next steps; it is the one on the path.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
server=
cleanup() {
  if [[ -n $server ]]; then kill -TERM "$server" 2>/dev/null || true; wait "$server" || true; fi
  rm -rf "$work"
}
trap cleanup EXIT

echo "demo: starting a server on the packaged model"
python -m service --model reference --tables a2sf/reference/tables \
  --port 0 --port-file "$work/port" --log-level warning &
server=$!

for _ in $(seq 600); do
  [[ -s $work/port ]] && break
  kill -0 "$server" 2>/dev/null || { echo "demo: the server did not start" >&2; exit 1; }
  sleep 0.1
done
[[ -s $work/port ]] || { echo "demo: the server was not ready within a minute" >&2; exit 1; }

prompt="Once upon a time there was a little girl named Lily."
printf '\n%s' "$prompt"
python -m service.client --target "127.0.0.1:$(cat "$work/port")" \
  --table mathqa --max-new-tokens 200 --temperature 0 \
  "$prompt"

kill -TERM "$server"
wait "$server"
server=
echo "demo: the server stopped cleanly"
python=${DEMO_PYTHON:-python}
echo "Serve it:  $python -m service --model reference --tables a2sf/reference/tables --port 50051"
echo "Ask it:    $python -m service.client \"Once upon a time\" --table mathqa --budget 64"
