"""`tunesmith demo`: a small model from random weights, trained in about a minute, then asked what it has not seen."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tunesmith.config import ModelSection, RunConfig, resolve_config
from tunesmith.demo.chats import make_chats, make_held_out
from tunesmith.model.tokenizer import train_tokenizer
from tunesmith.train.run import refuse_used_folder, run_training
from tunesmith.use.generate import Sampling, iterate_replies, load_speaker

NUM_CHATS = 12_000
EPOCHS = 2.0


def run_demo(output: Path, epochs: float = EPOCHS) -> float:
    """Train and talk; returns the share of right answers to held-out questions, as measured in this run."""
    refuse_used_folder(output)
    held_out = make_held_out(20, seed=1)
    chats = make_chats(NUM_CHATS, seed=0, held_out={question for question, _ in held_out})
    with tempfile.TemporaryDirectory() as folder:
        data, tokenizer = Path(folder) / "chats.jsonl", Path(folder) / "tokenizer"
        with data.open("w", encoding="utf-8") as file:
            for question, answer in chats:
                file.write(json.dumps({"prompt": question, "completion": answer}, ensure_ascii=False) + "\n")
        train_tokenizer((f"{q}\n{a}\n" for q, a in chats), vocab_size=600).save_pretrained(tokenizer)
        print(f"{len(chats):,} chats made, e.g. {chats[0][0]!r} -> {chats[0][1]!r}; a tokenizer trained on them\n")
        run_training(demo_config(data, tokenizer, output, epochs))
    return ask_held_out(output, held_out)


def demo_config(data: Path, tokenizer: Path, output: Path, epochs: float) -> RunConfig:
    flags = {
        "model.path": "new:tiny",
        "model.tokenizer": str(tokenizer),
        "data.train": [str(data)],
        "data.max_seq_len": 128,
        "data.eval_split": 0.02,
        "optim.lr": 1.5e-3,
        "optim.warmup_ratio": 0.05,
        "train.output_dir": str(output),
        "train.micro_batch_tokens": 512,
        "train.epochs": epochs,
        "train.log_steps": 5,
    }
    return resolve_config(RunConfig, None, flags)


def ask_held_out(output: Path, held_out: list[tuple[str, str]]) -> float:
    print("\nquestions that were not in the training data:")
    speaker = load_speaker(ModelSection(path=str(output)))
    replies = list(iterate_replies(speaker, [q for q, _ in held_out], Sampling(64, temperature=0)))
    right = 0
    for index, ((question, answer), (reply, _)) in enumerate(zip(held_out, replies, strict=True)):
        right += reply == answer
        if index % 8 == 0:
            verdict = "right" if reply == answer else f"wrong, {answer}"
            print(f"  {question}  ->  {reply}  ({verdict})")
    stopped = sum(has_stopped for _, has_stopped in replies)
    print(f"{right} of {len(held_out)} right, {stopped} stopped by themselves")
    print(f"\ntalk to it:          tunesmith chat {output}")
    print("train on your chats: tunesmith train --model Qwen/Qwen2.5-0.5B --data chats.jsonl --output runs/mine")
    return right / len(held_out)
