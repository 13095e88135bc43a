#!/usr/bin/env bash
# The way of docs/from_scratch.md: tokenizer, pre-training, fine-tuning, chat, on public text and chats, on a CPU.
# Usage: from_scratch.sh DATA WORK     DATA is the folder of docs/data.md, WORK a new folder
set -euo pipefail
data="$1"; work="$2"
tunesmith="${TUNESMITH:-$(dirname "$0")/../.venv/bin/tunesmith}"
mkdir -p "$work"
stage() { echo; echo "== $1"; date +%s > "$work/.started"; }
took() { echo "took $(( $(date +%s) - $(cat "$work/.started") )) s"; }

stage "tokenizer"
"$tunesmith" tokenizer --vocab-size 4096 --output "$work/tokenizer" \
  --data "$data/classic-books" "$data/chinese-classics" "$data/llamafactory/alpaca_zh_demo.json"
took
stage "pre-training"
"$tunesmith" train --model new:tiny --tokenizer "$work/tokenizer" \
  --model.config.hidden_size 192 --model.config.num_hidden_layers 6 --model.config.num_attention_heads 6 \
  --model.config.num_key_value_heads 3 --model.config.intermediate_size 512 \
  --data "$data"/classic-books/*Alice* "$data"/classic-books/*Time* "$data"/classic-books/*Treasure* \
  "$data"/classic-books/*Tom* "$data"/chinese-classics/聊斋志异.txt \
  --data.max_seq_len 512 --data.eval_split 0.02 --optim.lr 2e-3 --optim.schedule minimind --optim.warmup_ratio 0.02 \
  --train.micro_batch_tokens 4096 --train.epochs 2 --train.eval_steps 100 --train.log_steps 5 --output "$work/base"
took
stage "fine-tuning"
"$tunesmith" train --model "$work/base" \
  --data "$data/llamafactory/alpaca_en_demo.json" "$data/llamafactory/alpaca_zh_demo.json" \
  "$data/fastchat/dummy_conversation.json" \
  --data.max_seq_len 512 --data.eval_split 0.05 --optim.lr 1e-3 --train.micro_batch_tokens 2048 --train.epochs 3 \
  --train.eval_steps 100 --train.log_steps 5 --output "$work/chat"
took
stage "chat"
for question in "Who are you?" "Hello! What can you do?" "Give three tips for staying healthy." "你好，你是谁？"; do
  echo "you> $question"
  "$tunesmith" chat "$work/chat" --prompt "$question" --temperature 0 --max-new-tokens 60
done
