#!/usr/bin/env bash
# A 26M-parameter Qwen3-shaped model from random weights on real chats: 100 steps of about 2,000 tokens.
# Usage: real_data_26m.sh SHARED RUN [FLAG...]     SHARED holds data/ and tokenizers/ as in docs/data.md; FLAGs as of train
# PYTHON: our environment (default: that of .venv).
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
esac
if [ $# -lt 2 ]; then sed -n '3s/^# //p' "$0" >&2; exit 2; fi
shared="$1"; run="$2"
shift 2
python="${PYTHON:-$(dirname "$0")/../.venv/bin/python}"
data="$shared/data"
"$python" -m tunesmith train --model new:tiny --tokenizer "$shared/tokenizers/minimind" \
  --model.config.hidden_size 512 --model.config.num_hidden_layers 8 --model.config.num_attention_heads 8 \
  --model.config.num_key_value_heads 2 --model.config.head_dim 64 --model.config.intermediate_size 1408 \
  --data "$data/llamafactory/alpaca_en_demo.json" "$data/llamafactory/alpaca_zh_demo.json" \
  "$data/fastchat/dummy_conversation.json" \
  --train.max_steps 100 --optim.lr 1e-3 --optim.warmup_ratio 0.1 --output "$run" "$@"
