"""Kill training runs with SIGKILL at random moments, resume them each time, and compare the results.

Usage: chaos.py [--kills N] [--seed S] [--folder DIR] [--steps N] [--signal KILL|TERM|INT] [--deterministic]

Three kinds of run alternate: a GPT-2 with dropout and all weights trained, a LoRA adapter on a Qwen3 whose best
evaluated step is kept, and a PiSSA adapter. Each trains packed chats with accumulation and evaluation, finishes, and is
then extended by half its length. Both parts are done once without a kill; then runs of the same config are killed and
resumed until N kills have been made: at any moment, in the first moments of a resume, and several times within a second.
The writers are slowed down (SLOW), so that many kills happen during a save or the finish; what each kill hit is counted.
Each finished part must have exactly the same weights (SHA-256) and the same lines in metrics.jsonl, apart from
its clocks, as the part without kills; otherwise the exit code is 1. On a GPU this requires train.deterministic: give
--deterministic there.

The child processes are forked from this one, which has imported torch without using it: so a start takes milliseconds,
and a kill ends a whole process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import transformers

from tunesmith.cli import main
from tunesmith.model.bpe import train_tokenizer
from tunesmith.run import records
from tunesmith.training import checkpoint

# before the optimizer's file and the generators', before the manifest, before each rename (two where a checkpoint takes
# another one's place), before run.json
SLOW = ((checkpoint, "write_tensors"), (checkpoint, "write_manifest"), (Path, "rename"), (records, "write_text_atomic"))
PAUSE_S = 0.04


def slow_down() -> None:
    for owner, name in SLOW:
        setattr(owner, name, slowed(getattr(owner, name)))


def slowed(call: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any) -> Any:
        time.sleep(PAUSE_S)
        return call(*args)

    return slow


def in_child(work: Callable[[], int], log: Path) -> int:
    """Start `work` in a forked process; returns its pid."""
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
    """Two tiny models, their tokenizer, and chats of many lengths."""
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
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2}
    configs = {
        "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.1,
                                        attn_pdrop=0.1, embd_pdrop=0.1, **size),
        "qwen3": transformers.Qwen3Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                                          num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128,
                                          **size),
    }  # fmt: skip
    for name, config in configs.items():
        transformers.set_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return 0


BUSY = ("--data.max_seq_len", "96", "--train.micro_batch_tokens", "128", "--train.grad_accum_steps", "2",
        "--train.eval_steps", "7", "--train.save_steps", "3", "--train.log_steps", "2", "--optim.lr", "1e-3",
        "--train.keep_checkpoints", "2")  # fmt: skip
KINDS = {
    "full": ("gpt2",),
    "lora": ("qwen3", "--lora.kind", "lora", "--lora.rank", "4", "--lora.dropout", "0.1"),
    "pissa": ("qwen3", "--lora.kind", "pissa", "--lora.rank", "4"),
}


@dataclass(frozen=True)
class Part:
    """One part of a run, and its result without kills.

    Attributes:
        words: the command that starts it.
        steps: number of steps at its end.
    """

    words: Callable[[Path], list[str]]
    steps: int
    wanted: tuple[str, list[dict[str, Any]]]


def train_words(folder: Path, kind: str, steps: int, run: Path) -> list[str]:
    model, *flags = KINDS[kind]
    return ["train", "--model", str(folder / model), "--data", str(folder / "train.jsonl"), "--eval-data",
            str(folder / "eval.jsonl"), "--output", str(run), "--train.max_steps", str(steps), *BUSY, *flags,
            "--train.deterministic", os.environ.get("CHAOS_DETERMINISTIC", "false")]  # fmt: skip


CLOCKS = ("tokens_per_s", "memory_gb", "process_tokens_per_s", "process_memory_gb", "eval_s", "time")


def outcome(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Results that must be equal."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for clock in CLOCKS:
            record.pop(clock, None)
    [weights] = [
        path for name in ("model/model", "adapter/adapter_model") if (path := run / f"{name}.safetensors").exists()
    ]
    return hashlib.sha256(weights.read_bytes()).hexdigest(), records


def learn_parts(folder: Path, kind: str, steps: int, num_parts: int) -> list[Part]:
    """The parts of a kind, run once without a kill."""
    run, longer = folder / f"straight-{kind}", steps + steps // 2
    parts = []
    lives = (
        (steps, lambda run: train_words(folder, kind, steps, run)),
        (longer, lambda run: ["resume", str(run), "--train.max_steps", str(longer)]),
    )
    for end, words in lives[:num_parts]:
        if wait(in_child(lambda words=words: main(words(run)), run.with_suffix(".log"))):
            raise SystemExit(run.with_suffix(".log").read_text())
        parts.append(Part(words, end, outcome(run)))
        print(f"{kind}, without a kill: {end} steps, weights {parts[-1].wanted[0][:16]}", flush=True)
    return parts


def read_facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}


def newest_step(run: Path) -> int:
    newest = max((run / "checkpoints").glob("step-*"), default=None)
    return int(newest.name.removeprefix("step-")) if newest else 0


def logged_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    steps = [found[1] for found in re.finditer(r'"step": (\d+),', file.read_text())] if file.exists() else []
    return max(map(int, steps), default=0)


def half_saves(run: Path) -> set[Path]:
    return set((run / "checkpoints").glob(".*.partial"))


def moment_of(run: Path, steps: int, began_at: int | None, before: set[Path]) -> str:
    """What a kill has hit, judged by the files in the folder.

    Args:
        before: partial saves left by earlier kills.
        began_at: step of the newest checkpoint when a resume began; None for a new run.
    """
    facts, newest = read_facts(run), newest_step(run)
    if not facts:
        return "while preparing"
    if half_saves(run) - before:
        return "inside a save"
    if facts.get("finished_at_step") == steps:
        return "inside the report"
    if newest == steps:
        return "inside the finish"
    if newest and facts.get("extended_from_step") == newest:
        return "extended, before its first save"
    if began_at == newest:
        return "inside a resume, before its first save"
    return "between saves" if newest else "before the first save"


def draw_aim(rng: random.Random, run: Path, steps: int, burst: int) -> Callable[[], bool]:
    """What to wait for before the kill: a time, a step, a save, the finish, or the first moments of a start."""
    kind = "start" if burst else rng.choice(["while", "step", "step", "save", "finish", "start"])
    began = time.monotonic()
    if kind in ("while", "start"):
        deadline = began + rng.uniform(0, 0.8 if kind == "start" else 6.0)
        return lambda: time.monotonic() >= deadline
    if kind == "step":
        step = rng.randint(logged_step(run), steps)
        return lambda: logged_step(run) >= step
    if kind == "save":
        before = half_saves(run)
        return lambda: bool(half_saves(run) - before)
    return lambda: newest_step(run) == steps


def run_part(part: Part, run: Path, rng: random.Random, left: int, number: signal.Signals, hit: Counter[str]) -> None:
    """Run one part with kills and resumes until it ends; at most `left` kills, counted in `hit` by what they hit."""
    log, start, burst = run.with_suffix(".log"), hit.total(), 0
    while read_facts(run).get("finished_at_step") != part.steps:
        facts = read_facts(run)
        words = part.words(run) if not facts or "finished_at_step" in facts else ["resume", str(run)]
        began_at = newest_step(run) if words[0] == "resume" else None
        burst = max(0, burst - 1) or (rng.randint(2, 4) if rng.random() < 0.1 else 0)
        is_due = draw_aim(rng, run, part.steps, burst) if hit.total() - start < left else lambda: False
        delay, before = rng.uniform(0, 0.1), half_saves(run)
        child, code = in_child(lambda words=words: main(words), log), None
        while code is None and not is_due():
            done, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.002)
        if code is None:
            time.sleep(delay)
            os.kill(child, number)
            code = wait(child)
            if code == 0:  # it had just ended normally
                continue
            if number != signal.SIGKILL and code not in (3, -number):  # -number: its handler was not installed yet
                raise SystemExit(f"exit code {code} after {number.name}; see {log}:\n{log.read_text()[-2000:]}")
            hit[moment_of(run, part.steps, began_at, before)] += 1
        elif code:
            raise SystemExit(f"exit code {code}; see {log}:\n{log.read_text()[-2000:]}")


def run_chaos(kills: int, seed: int, folder: Path, steps: int, number: signal.Signals) -> int:
    if wait(in_child(lambda: make_inputs(folder), folder / "inputs.log")):
        raise SystemExit((folder / "inputs.log").read_text())
    is_short = kills < 10  # a few kills are not worth three kinds and their extensions
    kinds = list(KINDS)[: 1 if is_short else None]
    learned = {kind: learn_parts(folder, kind, steps, 1 if is_short else 2) for kind in kinds}
    rng, hit = random.Random(seed), Counter[str]()
    runs = wrong = 0
    while hit.total() < kills:
        runs += 1
        kind = kinds[runs % len(kinds)]
        run, before = folder / f"run-{runs}", hit.total()
        is_same = True
        for part in learned[kind]:
            run_part(part, run, rng, min(kills - hit.total(), 5), number, hit)
            is_same = is_same and outcome(run) == part.wanted
        wrong += not is_same
        print(
            f"run {runs}, {kind}: {hit.total() - before} kills, {'the same' if is_same else 'NOT THE SAME'}", flush=True
        )
        if is_same:
            shutil.rmtree(run)
    for moment, count in hit.most_common():
        print(f"{count:5} {moment}")
    print(
        f"{hit.total()} kills over {runs} runs of {len(kinds)} kinds, {runs - wrong} of them with the weights and "
        "metrics "
        "of the uninterrupted one"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="working folder, which is kept (default: a temporary folder)")
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL", help="KILL (default), TERM or INT")
    parser.add_argument("--deterministic", action="store_true", help="train.deterministic, for a GPU")
    options = parser.parse_args()
    slow_down()
    os.environ["CHAOS_DETERMINISTIC"] = str(options.deterministic).lower()
    number = signal.Signals[f"SIG{options.signal}"]
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        sys.exit(run_chaos(options.kills, options.seed, options.folder, options.steps, number))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(run_chaos(options.kills, options.seed, Path(temporary), options.steps, number))
