"""Kills a training run with SIGKILL at random moments, resumes it each time, and compares where it ends.

Usage: chaos.py [--kills N] [--seed S] [--folder DIR] [--steps N] [--signal KILL|TERM|INT] [--deterministic]

A small GPT-2 with dropout is trained on packed chats with accumulation and evaluation in between, once without a kill.
Then runs of the same config are killed and resumed until N kills are made; TUNESMITH_SLOW_SAVE makes the writer slow,
so that many of them fall inside a save. Each finished run must have the very same weights (SHA-256 of
model.safetensors) and the same lines in metrics.jsonl, apart from tokens_per_s. Exit code 1 where one has not. On a GPU
this is promised with train.deterministic only: give --deterministic there.

The child processes are forked from this one, which has imported torch and used it for nothing: so a start costs
milliseconds, and what is killed is a whole process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TUNESMITH_SLOW_SAVE"] = "0.04"

import transformers

from tunesmith.cli import main
from tunesmith.model.tokenizer import train_tokenizer

SLOWEST_S = 300.0


def in_child(work: Callable[[], int], log: Path) -> int:
    """Start `work` in a forked process; returns its number."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        with log.open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            code = work()
            sys.stdout.flush()
    finally:
        os._exit(code)


def wait(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def make_inputs(folder: Path) -> int:
    """A tiny model with dropout, its tokenizer, and chats of many lengths."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "says", "hello"]
    rng = random.Random(0)
    rows = []
    for number in range(60):
        said = [" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(2)]
        turns = [{"role": "user", "content": f"{number} {said[0]}"}, {"role": "assistant", "content": said[1]}]
        rows.append({"messages": turns})
    for name, part in (("train", rows[:50]), ("eval", rows[50:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tokenizer = train_tokenizer([" ".join(words)] * 20, vocab_size=300)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=len(tokenizer),
                                     bos_token_id=0, eos_token_id=2, resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)  # fmt: skip
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return 0


def train_words(folder: Path, run: Path, steps: int) -> list[str]:
    return ["train", "--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--eval-data",
            str(folder / "eval.jsonl"), "--output", str(run), "--data.max_seq_len", "96", "--train.micro_batch_tokens",
            "128", "--train.grad_accum_steps", "2", "--train.max_steps", str(steps), "--train.eval_steps", "7",
            "--train.save_steps", "3", "--train.log_steps", "2", "--optim.lr", "1e-3", "--train.keep_checkpoints", "2",
            "--train.deterministic", os.environ.get("CHAOS_DETERMINISTIC", "false")]  # fmt: skip


def outcome(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """What must be the same."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("tokens_per_s", None)
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest(), records


def run_until_done(
    folder: Path, run: Path, steps: int, rng: random.Random, span_s: float, left: int, number: signal.Signals
) -> dict[str, int]:
    """One run, killed and resumed until it ends or `left` kills are made; how many, and what they hit."""
    counts = {"kills": 0, "in a save": 0, "before step 1": 0}
    log = run.with_suffix(".log")
    while True:
        is_run = (run / "run.json").exists()
        words = ["resume", str(run)] if is_run else train_words(folder, run, steps)
        child = in_child(lambda words=words: main(words), log)
        deadline = time.monotonic() + (rng.uniform(0, span_s) if counts["kills"] < left else SLOWEST_S)
        code = None
        while time.monotonic() < deadline and code is None:
            done, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.002)
        if code is None:
            os.kill(child, number)
            code = wait(child)
            if code == 0:  # it had just ended by itself
                return counts
            if number != signal.SIGKILL and code not in (3, -number):  # -number: it was not listening yet
                raise SystemExit(f"exit code {code} after {number.name}; see {log}:\n{log.read_text()[-2000:]}")
            counts["kills"] += 1
            counts["in a save"] += any((run / "checkpoints").glob(".*.partial"))
            counts["before step 1"] += not (run / "metrics.jsonl").exists()
        elif code == 0:
            return counts
        else:
            raise SystemExit(f"exit code {code}; see {log}:\n{log.read_text()[-2000:]}")


def run_chaos(kills: int, seed: int, folder: Path, steps: int, number: signal.Signals) -> int:
    if wait(in_child(lambda: make_inputs(folder), folder / "inputs.log")):
        raise SystemExit((folder / "inputs.log").read_text())
    began = time.monotonic()
    if wait(in_child(lambda: main(train_words(folder, folder / "straight", steps)), folder / "straight.log")):
        raise SystemExit((folder / "straight.log").read_text())
    span_s = time.monotonic() - began
    wanted = outcome(folder / "straight")
    print(f"without a kill: {steps} steps in {span_s:.1f} s, weights {wanted[0][:16]}", flush=True)
    rng = random.Random(seed)
    total, runs, wrong = {"kills": 0, "in a save": 0, "before step 1": 0}, 0, 0
    while total["kills"] < kills:
        runs += 1
        run = folder / f"run-{runs}"
        counts = run_until_done(folder, run, steps, rng, 0.9 * span_s, kills - total["kills"], number)
        total = {name: total[name] + counts[name] for name in total}
        is_same = outcome(run) == wanted
        wrong += not is_same
        print(f"run {runs}: {counts['kills']} kills, {'the same' if is_same else 'NOT THE SAME'}", flush=True)
        if is_same:
            shutil.rmtree(run)
    print(
        f"{total['kills']} kills ({total['in a save']} inside a save, {total['before step 1']} before step 1) over "
        f"{runs} runs, {runs - wrong} of them with the weights and metrics of the uninterrupted one"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="where to work and what to keep (default: a temporary folder)")
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL", help="KILL (default), TERM or INT")
    parser.add_argument("--deterministic", action="store_true", help="train.deterministic, for a GPU")
    options = parser.parse_args()
    os.environ["CHAOS_DETERMINISTIC"] = str(options.deterministic).lower()
    number = signal.Signals[f"SIG{options.signal}"]
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        sys.exit(run_chaos(options.kills, options.seed, options.folder, options.steps, number))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(run_chaos(options.kills, options.seed, Path(temporary), options.steps, number))
