"""Train 50 steps with tunesmith and write down which rows each step was made of, for theirs.py to repeat.

Usage: ours.py FOLDER MODE     MODE: none (prompt + completion + EOS) or alpaca (through a chat template)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tunesmith.chat_template.template import load_built_in
from tunesmith.cli import main
from tunesmith.config.runfile import read_yaml
from tunesmith.config.schema import RunConfig
from tunesmith.data.pack import plan_epoch
from tunesmith.data.store import open_store
from tunesmith.demo.tasks import draw_chats
from tunesmith.model.bpe import train_tokenizer

STEPS = 50


def build_inputs(folder: Path, mode: str) -> list[dict[str, object]]:
    """A 2-layer model with random weights, a tokenizer, and rows of our own generator, of very unequal length."""
    pairs = [(task.question, task.answer) for task in draw_chats(1500, seed=3, held_out=set())]
    pairs += [(f"Say it {n} times: hello", "hello " * n + "and that is all.") for n in range(1, 60)]
    tokenizer = train_tokenizer((f"{q}\n{a}\n" for q, a in pairs), vocab_size=800)
    tokenizer.chat_template = load_built_in("alpaca", add_bos=False)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=256, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if mode == "none":
        return [{"prompt": f"{q}\n", "completion": a} for q, a in pairs]
    return [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in pairs
    ]


def run(folder: Path, mode: str) -> None:
    rows = build_inputs(folder, mode)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    template = ["--data.chat_template", "none"] if mode == "none" else []
    code = main([
        "train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--output", str(folder / "run"),
        "--optim.lr", "1e-3", "--optim.warmup_ratio", "0", "--train.max_steps", str(STEPS), "--data.max_seq_len", "256",
        "--train.micro_batch_tokens", "512", "--train.seed", "5", *template,
    ])  # fmt: skip
    assert code == 0
    config = RunConfig.model_validate(read_yaml(folder / "run" / "config.yaml"))
    store = open_store(folder / "run" / "tokens")
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < STEPS:
        packs = plan_epoch(store.lengths, config.train.micro_batch_tokens or 0, config.train.seed, epoch)
        steps += [[int(store.row_numbers[i]) - 1 for i in pack] for pack in packs]
        epoch += 1
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    (folder / "ours.json").write_text(json.dumps({"steps": steps[:STEPS], "losses": losses}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
