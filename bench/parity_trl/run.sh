#!/usr/bin/env bash
# Compare the losses of each step with TRL 1.16 on the same rows, order, weights and hyper-parameters (fp32, 50 steps).
# Usage: run.sh [--write-golden]     --write-golden: keep TRL's losses in tests/golden/trl_losses.json
# OURS_PYTHON: our environment (default .venv of this repository; run `make test` or `make demo` once before).
# TRL_PYTHON: an environment with TRL (default: made in bench/parity_trl/.venv).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
keep=()
case "${1:-}" in
  -h | --help) sed -n '2,5s/^# //p' "$0"; exit 0 ;;
  --write-golden) keep=(--write-golden "$here/../../tests/golden/trl_losses.json") ;;
  "") ;;
  *) echo "unknown argument: $1 (see --help)" >&2; exit 2 ;;
esac
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
  "$theirs" "$here/theirs.py" "$work/$mode" "${keep[@]}" 2> "$work/$mode/trl.log" | grep '^TRL' || { tail -20 "$work/$mode/trl.log"; exit 1; }
done
