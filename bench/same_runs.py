"""Run the same commands with two versions of the code and compare their results byte for byte.

For changes that must not change behaviour. Each version runs in separate processes with its own sources on the path: two
tiny models and a set of runs (full with dropout, LoRA, PiSSA, mixture of experts, evaluation split, unrolled chats, long
raw texts, bf16), each then extended with `tunesmith resume`. Compared are the weights, the token store and the ledger by
SHA-256, the lines of metrics.jsonl apart from its clocks, and the labels printed by `preview --json`. With --cross,
runs started by the old version are also resumed by the new one. The words of refusal reasons and notes are not compared,
since they are messages; the rows that they are about are.

    python bench/same_runs.py --before HEAD~20 [--cross]

Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "says",
    "hello",
    "to",
    "you",
    "你好",
    "世界",
    "é",
    "<think>",
    "[INST]",
]
# A template that drops the reasoning of earlier turns, so that a chat of several turns is unrolled
REWRITING = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- if m.role == 'assistant' and not loop.last and '</think>' in m.content -%}"
    "{{ m.content.split('</think>')[-1] }}{%- else -%}{{ m.content }}{%- endif -%}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
CLOCKS = (
    "tokens_per_s",
    "memory_gb",
    "process_tokens_per_s",
    "process_memory_gb",
    "eval_s",
    "time",
)  # of a record in metrics.jsonl: these differ from run to run
WORDING = ("reason", "notes")  # of `preview --json`
BUSY = ["--data.max_seq_len", "96", "--train.micro_batch_tokens", "128", "--train.grad_accum_steps", "2",
        "--train.eval_steps", "7", "--train.save_steps", "3", "--train.log_steps", "2", "--optim.lr", "1e-3"]  # fmt: skip
SPLIT = ["--data.eval_split", "0.2"]
LORA = ["--lora.kind", "lora", "--lora.rank", "4", "--lora.dropout", "0.1"]
RUNS: dict[str, list[str]] = {
    "full": ["--model", "gpt2", "--data", "chats.jsonl", "--eval-data", "held_out.jsonl", *BUSY],
    "split": ["--model", "qwen3", "--data", "chats.jsonl", *SPLIT, *BUSY],
    "lora": ["--model", "qwen3", "--data", "chats.jsonl", "--eval-data", "held_out.jsonl", *BUSY, *LORA],
    "pissa": ["--model", "qwen3", "--data", "chats.jsonl", *SPLIT, *BUSY, "--lora.kind", "pissa", "--lora.rank", "4"],
    "moe": ["--model", "moe", "--data", "chats.jsonl", *SPLIT, *BUSY],
    "unrolled": ["--model", "qwen3", "--data", "thoughts.jsonl", "--data.chat_template", "rewriting.jinja", *SPLIT, *BUSY],
    "joined": ["--model", "qwen3", "--data", "pairs.jsonl", "--data.chat_template", "none", *SPLIT, *BUSY],
    "text": ["--model", "qwen3", "--data", "texts.jsonl", *SPLIT, *BUSY],
    "bf16": ["--model", "qwen3", "--data", "chats.jsonl", *SPLIT, *BUSY, "--train.precision", "bf16"],
    "tokens": ["--model", "qwen3", "--data", "chats.jsonl", *SPLIT, *BUSY, *LORA, "--model.add_tokens", "<x>", "<y>"],
}  # fmt: skip
STEPS, LONGER = 9, 13


def tunesmith(source: Path, words: list[str], folder: Path) -> str:
    """Standard output of a command, run with the code in `source`."""
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"tunesmith {' '.join(words)}\nended with {done.returncode} on {source}:\n{done.stdout}{done.stderr}")
    return done.stdout


def make_inputs(source: Path, folder: Path) -> None:
    """Rows of many lengths, a tokenizer, and three tiny models; created once, by the old version."""
    import transformers

    rng = random.Random(0)

    def say() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))

    def chat(number: int, turns: int, thought: str = "") -> dict[str, Any]:
        messages = [{"role": "system", "content": say()}] if number % 3 == 0 else []
        for _ in range(turns):
            reply = f"<think>{say()}</think>{say()}" if thought else say()
            messages += [{"role": "user", "content": f"{number} {say()}"}, {"role": "assistant", "content": reply}]
        return {"messages": messages}

    files = {
        "chats": [chat(n, 1 + n % 3) for n in range(60)],
        "held_out": [chat(n, 1) for n in range(100, 110)],
        "thoughts": [chat(n, 1 + n % 3, "yes") for n in range(40)],
        "pairs": [{"prompt": say(), "completion": say()} for _ in range(60)],
        "texts": [{"text": " ".join(say() for _ in range(rng.randint(1, 40)))} for _ in range(20)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "rewriting.jinja").write_text(REWRITING, encoding="utf-8")
    (folder / "words.txt").write_text(f"{' '.join(WORDS)}\n" * 50, encoding="utf-8")
    tunesmith(source, ["tokenizer", "--data", "words.txt", "--vocab-size", "320", "--output", "tokenizer"], folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 128}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "intermediate_size": 64, **size}  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.01}
    configs = {
        "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **size),
        "qwen3": transformers.Qwen3Config(**small),
        "moe": transformers.Qwen3MoeConfig(**small, **experts),
    }
    for name, config in configs.items():
        transformers.set_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def outcome(run: Path) -> dict[str, str]:
    """SHA-256 of everything that must be equal."""

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()[:16]

    found = {}
    for pattern in ("model/*.safetensors", "adapter/*.safetensors", "tokens/*", "eval_tokens/*"):
        found |= {str(path.relative_to(run)): digest(path.read_bytes()) for path in sorted(run.glob(pattern))}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]
    found["metrics"] = digest(json.dumps(kept).encode())
    ledger = json.loads((run / "data_ledger.json").read_text(encoding="utf-8"))
    ledger.pop("sha256", None)
    ledger["template"].pop("date")
    for part in ledger.values():
        for entry in (part.get("files", {}) if isinstance(part, dict) else {}).values():
            for key in ("refused", "notes"):  # the rows of each reason, without its words
                entry[key] = sorted(entry[key].values())
    found["ledger"] = digest(json.dumps(ledger, sort_keys=True).encode())
    return found


def do_run(source: Path, resumer: Path, name: str, inputs: Path, folder: Path) -> dict[str, str]:
    """Train, then extend; returns the outcome after each."""
    run = folder / name
    tunesmith(source, ["train", *RUNS[name], "--output", str(run), "--train.max_steps", str(STEPS)], inputs)
    first = outcome(run)
    tunesmith(resumer, ["resume", str(run), "--train.max_steps", str(LONGER)], inputs)
    found = {f"{key} at {STEPS}": value for key, value in first.items()} | outcome(run)
    for flag in ("--data.train_on=all", "--data.history=last_turn"):
        words = [*RUNS[name][:4], *(RUNS[name][4:6] if "--data.chat_template" in RUNS[name] else [])]
        labels = tunesmith(resumer, ["preview", *words, "--rows", "50", "--json", flag], inputs)
        rows = [{k: v for k, v in json.loads(line).items() if k not in WORDING} for line in labels.splitlines()]
        found[f"preview {flag}"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="HEAD", metavar="REV", help="the old version (default: HEAD)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="which runs (default: all)")
    parser.add_argument("--cross", action="store_true", help="also resume runs of the old version with the new one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="same_runs_"))
    old = folder / "source"
    differs = 0
    try:
        add = ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(old), options.before]
        subprocess.run(add, check=True)
        inputs = folder / "inputs"
        inputs.mkdir()
        make_inputs(old / "src", inputs)
        versions = {"before": (old / "src", old / "src"), "after": (ROOT / "src", ROOT / "src")}
        if options.cross:
            versions["cross"] = (old / "src", ROOT / "src")
        for name in options.runs:
            found = {}
            for version, (source, resumer) in versions.items():
                (folder / version).mkdir(exist_ok=True)
                found[version] = do_run(source, resumer, name, inputs, folder / version)
            others = [version for version in versions if version != "before"]
            wrong = [
                f"{version}: {key}"
                for version in others
                for key in sorted({*found["before"], *found[version]})
                if found["before"].get(key) != found[version].get(key)
            ]
            differs += bool(wrong)
            print(f"{name}: " + (f"differs in {', '.join(wrong)}" if wrong else f"{len(found['before'])} equal"))
    finally:
        subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(old)], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
