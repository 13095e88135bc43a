#!/usr/bin/env bash
# Every kind of adapter on real chats: train, remove the last checkpoint, resume, merge with its proof.
# Usage: adapter_kinds.sh MODEL DATA FOLDER [KIND...]     KIND: lora rslora dora pissa olora nf4 int8 (default: all)
# PYTHON: our environment (default: that of .venv).
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
esac
if [ $# -lt 3 ]; then sed -n '3s/^# //p' "$0" >&2; exit 2; fi
python="${PYTHON:-$(dirname "$0")/../.venv/bin/python}"
model=$1 data=$2 folder=$3
shift 3
[ $# -gt 0 ] || set -- lora rslora dora pissa olora nf4 int8
for kind in "$@"; do
  case $kind in
    nf4 | int8) flags=(--lora.kind lora --lora.quantize "$kind") ;;
    *) flags=(--lora.kind "$kind") ;;
  esac
  run=$folder/$kind
  "$python" -m tunesmith train --model "$model" --data "$data" --output "$run" --data.max_seq_len 256 --data.limit 200 \
    --train.micro_batch_tokens 512 --train.max_steps 8 --train.save_steps 4 --train.keep_checkpoints 9 "${flags[@]}" > "$run.log"
  grep -E "^step (1|8)/8" "$run.log" | sed "s/^/$kind: /"
  cp -r "$run" "$run-part"
  rm -r "$run-part/adapter" "$run-part/checkpoints/step-000008"
  "$python" -m tunesmith resume "$run-part" > "$run-part.log"
  cmp "$run/adapter/adapter_model.safetensors" "$run-part/adapter/adapter_model.safetensors"
  echo "$kind: resumed to the same bytes"
  "$python" -m tunesmith merge "$run" --output "$run-merged" | grep proof | sed "s/^/$kind: /"
done
