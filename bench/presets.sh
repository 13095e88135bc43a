#!/usr/bin/env bash
# Five steps of every preset at its full size, then the saved model opened in plain transformers.
# Usage: presets.sh TOKENIZER DATA WORK
set -euo pipefail
tokenizer="$1"; data="$2"; work="$3"
bin="${BIN:-$(dirname "$0")/../.venv/bin}"
for preset in tiny minimind-26m minimind-64m minimind-104m minimind-moe minimind-3-moe; do
  "$bin/tunesmith" train --model "new:$preset" --tokenizer "$tokenizer" --data "$data" --data.limit 40 \
    --data.max_seq_len 256 --train.micro_batch_tokens 256 --train.max_steps 5 --optim.lr 1e-3 --output "$work/$preset" \
    | grep -E "^(model |step )"
  "$bin/python" - "$work/$preset" <<'PY'
import json, sys
from transformers import AutoModelForCausalLM
records = [json.loads(line) for line in open(f"{sys.argv[1]}/metrics.jsonl")]
model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/model")
extra = {k: records[-1][k] for k in ("router_loss", "expert_load") if k in records[-1]}
print(f"  opened: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters {extra or ''}")
PY
  rm -rf "${work:?}/$preset"
done
