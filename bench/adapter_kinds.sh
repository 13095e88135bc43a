#!/bin/sh
# Every kind of adapter on real chats: train, kill after a checkpoint's worth of steps, resume, merge with its proof.
# Usage: adapter_kinds.sh MODEL DATA FOLDER
set -eu
model=$1 data=$2 folder=$3
for kind in lora rslora dora pissa olora nf4 int8; do
  case $kind in
    nf4 | int8) flags="--lora.kind lora --lora.quantize $kind" ;;
    *) flags="--lora.kind $kind" ;;
  esac
  run=$folder/$kind
  # shellcheck disable=SC2086
  tunesmith train --model "$model" --data "$data" --output "$run" --data.max_seq_len 256 --data.limit 200 \
    --train.micro_batch_tokens 512 --train.max_steps 8 --train.save_steps 4 --train.keep_checkpoints 9 $flags > "$run.log"
  grep -E "^step (1|8)/8" "$run.log" | sed "s/^/$kind: /"
  cp -r "$run" "$run-part"
  rm -r "$run-part/adapter" "$run-part/checkpoints/step-000008"
  tunesmith resume "$run-part" > "$run-part.log"
  cmp "$run/adapter/adapter_model.safetensors" "$run-part/adapter/adapter_model.safetensors" && echo "$kind: resumed to the same bytes"
  tunesmith merge "$run" --output "$run-merged" | grep proof | sed "s/^/$kind: /"
done
