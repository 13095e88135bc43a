#!/usr/bin/env bash
# Per-step losses of tunesmith and TRL 1.16 on the same rows, order, weights and hyper-parameters (fp32, 50 steps).
# TRL gets an environment of its own; run `make test` or `make demo` once before, for ours.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
ours="${OURS_PYTHON:-$here/../../.venv/bin/python}"
theirs="${TRL_PYTHON:-$here/.venv/bin/python}"
if [ ! -x "$theirs" ]; then
  python3 -m venv "$here/.venv"
  "$here/.venv/bin/pip" install --quiet torch==2.13.0
  "$here/.venv/bin/pip" install --quiet trl==1.16.0
fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for mode in none alpaca; do
  mkdir "$work/$mode"
  "$ours" "$here/ours.py" "$work/$mode" "$mode" > "$work/$mode/log" || { cat "$work/$mode/log"; exit 1; }
  echo -n "$mode: "
  "$theirs" "$here/theirs.py" "$work/$mode" 2> "$work/$mode/trl.log" | grep '^TRL' || { tail -20 "$work/$mode/trl.log"; exit 1; }
done
