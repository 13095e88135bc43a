#!/usr/bin/env bash
# What the label proof costs on real chats, with MiniMind's template and with Qwen3's, which unrolls.
# Usage: label_cost.sh SHARED [ROUNDS]     SHARED holds data/, templates/ and tokenizers/ as in docs/data.md
# PYTHON: our environment (default: that of .venv).
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
  "") sed -n '3s/^# //p' "$0" >&2; exit 2 ;;
esac
here="$(cd "$(dirname "$0")" && pwd)"
shared=$1 rounds=${2:-7} python=${PYTHON:-$here/../.venv/bin/python}
data=$shared/data
"$python" "$here/label_cost.py" "$shared/tokenizers/minimind" "$data/fastchat/dummy_conversation.json" "$data/emollm/data.json" \
  "$data/medicalgpt/sharegpt_zh_1K_format.jsonl" --rounds "$rounds" --template "$shared/templates/llamacpp/Qwen-Qwen3-0.6B.jinja"
"$python" "$here/label_cost.py" "$shared/tokenizers/minimind" "$data/llamafactory/alpaca_en_demo.json" "$data/emollm/data.json" \
  "$data/medicalgpt/sharegpt_zh_1K_format.jsonl" "$data/llamafactory/glaive_toolcall_en_demo.json" --rounds "$rounds"
