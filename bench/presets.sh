#!/usr/bin/env bash
# Five steps of every preset at its full size, then the saved model opened in plain transformers.
# Usage: presets.sh TOKENIZER DATA WORK [PRESET...]     (default: all presets)
# PYTHON: our environment (default: that of .venv).
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
esac
if [ $# -lt 3 ]; then sed -n '3s/^# //p' "$0" >&2; exit 2; fi
tokenizer="$1"; data="$2"; work="$3"
shift 3
[ $# -gt 0 ] || set -- tiny minimind-26m minimind-64m minimind-104m minimind-moe minimind-3-moe
python="${PYTHON:-$(dirname "$0")/../.venv/bin/python}"
for preset in "$@"; do
  "$python" -m tunesmith train --model "new:$preset" --tokenizer "$tokenizer" --data "$data" --data.limit 40 \
    --data.max_seq_len 256 --train.micro_batch_tokens 256 --train.max_steps 5 --optim.lr 1e-3 --output "$work/$preset" \
    | grep -E "^(model |step )"
  "$python" - "$work/$preset" <<'PY'
import json, sys
from transformers import AutoModelForCausalLM
records = [json.loads(line) for line in open(f"{sys.argv[1]}/metrics.jsonl")]
model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/model")
extra = {k: records[-1][k] for k in ("router_loss", "expert_load") if k in records[-1]}
print(f"  opened: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters {extra or ''}")
PY
  rm -rf "${work:?}/$preset"
done
