"""Examples, usage lines and section titles of the commands' help."""

from __future__ import annotations

# shown first by --help of the command; every command has one
EXAMPLES = {
    "": """  tunesmith check --model Qwen/Qwen2.5-0.5B --data chats.jsonl
  tunesmith train --model Qwen/Qwen2.5-0.5B --data chats.jsonl --output runs/mine
  tunesmith chat runs/mine
""",
    "train": """  tunesmith train --model Qwen/Qwen2.5-0.5B --data chats.jsonl --output runs/mine
  tunesmith train run.yaml --optim.lr 1e-5 --train.epochs 2
  tunesmith train recipe:qwen2.5-0.5b-lora --data chats.jsonl --output runs/lora
""",
    "resume": """  tunesmith resume runs/mine
  tunesmith resume runs/mine --train.max_steps 2000
""",
    "preview": """  tunesmith preview --model Qwen/Qwen2.5-0.5B --data chats.jsonl --rows 3
  tunesmith preview --model Qwen/Qwen2.5-0.5B --data chats.jsonl --row chats.jsonl:222
  tunesmith preview --model Qwen/Qwen2.5-0.5B --data chats.jsonl --only refused cut
""",
    "check": """  tunesmith check --model Qwen/Qwen2.5-0.5B --data chats.jsonl --eval-data held-out.jsonl
""",
    "lr-find": """  tunesmith lr-find --model Qwen/Qwen2.5-0.5B --data chats.jsonl
  tunesmith lr-find run.yaml --lora.kind lora
""",
    "merge": """  tunesmith merge runs/lora --output merged
  tunesmith merge runs/chat runs/code --method ties --weights 1 0.5 --output both
""",
    "export": """  tunesmith export runs/mine --format gguf --type q8_0 --output mine.gguf
  tunesmith export mine.gguf --verify
  tunesmith export runs/mine --format minimind --output for-minimind
  tunesmith export full_sft_512.pth --tokenizer minimind/model --format hf --output minimind-26m
""",
    "push": """  tunesmith push runs/mine me/my-model
  tunesmith push runs/mine me/my-model --license apache-2.0 --yes
  tunesmith push runs/lora me/my-adapter --base me/my-base --include metrics report
""",
    "tokenizer": """  tunesmith tokenizer --data books/ --vocab-size 4096 --output tokenizer
""",
    "report": """  tunesmith report runs/mine
""",
    "evaluate": """  tunesmith evaluate runs/mine
  tunesmith evaluate runs/mine --data held-out.jsonl --base
  tunesmith evaluate runs/one runs/two --data held-out.jsonl --limit 500
""",
    "generate": """  tunesmith generate runs/teacher --data prompts.jsonl --output answers.jsonl
  tunesmith generate runs/mine --data tasks.jsonl --samples 8 --keep correct --output correct.jsonl
  tunesmith generate runs/mine --data math.jsonl --samples 8 --check number --keep-per-row 4 --output right.jsonl
""",
    "chat": """  tunesmith chat runs/mine
  tunesmith chat runs/mine --prompt "Who are you?"
""",
    "serve": """  tunesmith serve runs/mine
  tunesmith serve runs/lora runs/other-lora --port 8080 --api-key-file key.txt
""",
    "recipes": """  tunesmith recipes
  tunesmith train recipe:qwen2.5-0.5b-lora --data chats.jsonl --output runs/lora
""",
    "convert-config": """  tunesmith convert-config axolotl.yaml --output run.yaml
  tunesmith convert-config qwen3_lora_sft.yaml --dataset-info LLaMA-Factory/data > run.yaml
  tunesmith convert-config --from minimind -- python train_full_sft.py --dim 512 --n_layers 8
""",
    "demo": """  tunesmith demo
  tunesmith demo --output runs/first
""",
}
EPILOG = {
    "evaluate": "without --data, a run is evaluated on the rows that it held out\n",
    "push": "needs a token of the hub that can write: hf auth login, or HF_TOKEN\n",
    "generate": "killed or interrupted, the same command continues; then: tunesmith train --data FILE ...\n",
    "lr-find": "takes the flags and run file of train, makes no RUN folder, and prints the optim.lr to use\n",
    "chat": "in the chat: /reset forgets the conversation, /system TEXT sets the system prompt, /exit leaves\n",
}
USAGE = {
    "evaluate": "tunesmith evaluate MODEL_OR_RUN ... [--data D ...] [--base] [--limit N] [--json]",
    "generate": "tunesmith generate MODEL_OR_RUN --data D ... --output FILE.jsonl [--samples N] [--keep correct|best]",
    "train": "tunesmith train [run.yaml] --model M --data D --output RUN [--section.key value ...]",
    "resume": "tunesmith resume RUN [--allow PART ...] [--section.key value ...]",
    "convert-config": "tunesmith convert-config FILE [--dataset-info DIR] [--output run.yaml]\n"
    "       tunesmith convert-config --from minimind [--generation G] [--output run.yaml] -- COMMAND ...",
    "tokenizer": "tunesmith tokenizer [run.yaml] --data D --vocab-size N --output DIR",
    "check": "tunesmith check [run.yaml] --model M --data D [--eval-data E] [--strict] [--json | --html out.html]",
    "lr-find": "tunesmith lr-find [run.yaml] --model M --data D [--section.key value ...]",
    "preview": "tunesmith preview [run.yaml] --model M --data D [--rows N] [--row FILE:N ...] [--only KIND ...]\n"
    "                         [--json | --html out.html]",
}
SECTIONS = {
    "model": "the model and its tokenizer",
    "data": "the data, its columns and its chat template",
    "optim": "optimizer and learning rate",
    "lora": "an adapter instead of all weights",
    "train": "length, batch, precision, saving and logging",
}
