"""Send signals at random moments to a run, its process group or all of its processes, and look at what is left.

Usage: signals.py [--count N] [--seed S] [--folder DIR] [--only KIND]

Kinds of run: plain; stream (data.stream); workers (rows labelled by two processes, and kept in a cache); stages. Each is
run once without a signal. Then it gets one signal (sometimes two): SIGINT, SIGTERM or SIGHUP, after which it must end
with exit code 3 (or 0, where it was about to end) and one message without a traceback; SIGUSR1, after which it must go
on to its end; or SIGTSTP and SIGCONT. No process may be left behind. It is resumed, or begun again where nothing was
saved, and must end with the weights of the run without a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from chaos import in_child, make_inputs, wait

from tunesmith.cli import main
from tunesmith.files import sha256_file
from tunesmith.streaming import data as stream_data

KINDS = ("plain", "stream", "workers", "stages")
HOW = re.compile("tunesmith resume|is finished, without a report")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COMMON = ("--data.max_seq_len", "96", "--train.micro_batch_tokens", "128", "--train.grad_accum_steps", "2", "--optim.lr",
          "1e-3", "--train.save_steps", "4", "--train.log_steps", "2")  # fmt: skip


def make_data(folder: Path) -> None:
    if wait(in_child(lambda: make_inputs(folder), folder / "inputs.log")):
        raise SystemExit((folder / "inputs.log").read_text())
    rows = (folder / "train.jsonl").read_text().splitlines()
    (folder / "many.jsonl").write_text("".join(f"{row}\n" for row in rows * 400))
    run = {"model": {"path": str(folder / "gpt2")},
           "data": {"max_seq_len": 96, "eval": [str(folder / "eval.jsonl")]},
           "train": {"micro_batch_tokens": 128, "save_steps": 3, "max_steps": 9, "eval_steps": 4},
           "stages": [{"name": name, "data": {"train": [str(folder / "train.jsonl")]}, "train": {"seed": number}}
                      for number, name in enumerate(("first", "second", "third"))]}  # fmt: skip
    (folder / "stages.yaml").write_text(json.dumps(run))


def words_of(kind: str, folder: Path, output: Path) -> list[str]:
    start = ["train", "--model", str(folder / "gpt2"), "--output", str(output)]
    short, many = str(folder / "train.jsonl"), str(folder / "many.jsonl")
    eval_flags = ["--eval-data", str(folder / "eval.jsonl"), "--train.eval_steps", "7"]
    return {
        "plain": [*start, "--data", short, *COMMON, "--train.max_steps", "30", *eval_flags],
        "stream": [*start, "--data", short, *COMMON, "--data.stream", "true", "--train.max_steps", "30", *eval_flags],
        "workers": [*start, "--data", many, *COMMON, "--data.workers", "2", "--data.cache", "true",
                    "--train.max_steps", "6"],
        "stages": ["train", str(folder / "stages.yaml"), "--output", str(output)],
    }[kind]  # fmt: skip


def start(words: list[str], log: Path, cache: Path) -> int:
    def work() -> int:
        os.setsid()
        os.environ["TUNESMITH_CACHE"] = str(cache)
        stream_data.MIN_SAMPLES, stream_data.MIN_TOKENS = 24, 900
        return main(words)

    return in_child(work, log)


def processes() -> dict[int, tuple[int, int]]:
    """Process -> its parent and session, of all that live."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session, *_ = path.read_text().rpartition(")")[2].split()
            if state != "Z":
                found[int(path.parent.name)] = (int(parent), int(session))
    return found


def family(pid: int) -> list[int]:
    """The process and all that it has started, directly or not."""
    alive, own = processes(), [pid]
    for one in own:
        own += [child for child, (parent, _) in alive.items() if parent == one and child not in own]
    return own


def end_of(pid: int, limit_s: float = 90.0) -> int | None:
    """Exit code; None where it does not end."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for one in family(pid):
        with contextlib.suppress(OSError):
            os.kill(one, signal.SIGKILL)
    wait(pid)
    return None


def weights(run: Path) -> str:
    return " ".join(sha256_file(path)[:16] for path in sorted(run.rglob("model/model.safetensors")))


def send(pid: int, number: int, reach: str) -> None:
    with contextlib.suppress(OSError):
        if reach == "group":
            os.killpg(pid, number)
            return
        for one in family(pid) if reach == "all" else [pid]:
            with contextlib.suppress(OSError):
                os.kill(one, number)


class Bench:
    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        make_data(folder)
        self.whole: dict[str, tuple[str, float]] = {}

    def learn(self, kind: str) -> tuple[str, float]:
        """Weights of the run without a signal, and its seconds."""
        if kind not in self.whole:
            run, log, begin = self.folder / f"whole-{kind}", self.folder / f"whole-{kind}.log", time.monotonic()
            if end_of(start(words_of(kind, self.folder, run), log, self.folder / f"cache-{kind}")) != 0:
                raise SystemExit(log.read_text())
            self.whole[kind] = weights(run), time.monotonic() - begin
        return self.whole[kind]

    def try_one(self, kind: str, name: str) -> str:
        """What happened; begins with WRONG where it may not."""
        wanted, seconds = self.learn(kind)
        rng, run, log, cache = self.rng, self.folder / name, self.folder / f"{name}.log", self.folder / f"cache-{name}"
        words = words_of(kind, self.folder, run)
        pid = start(words, log, cache)
        moment = rng.random() * seconds
        time.sleep(moment)
        number = rng.choice((*ENDING, *ENDING, signal.SIGUSR1, signal.SIGTSTP))
        reach = rng.choice(("one", "group", "all"))
        known = set(family(pid))
        send(pid, number, reach)
        if number == signal.SIGTSTP:
            time.sleep(0.5)
            send(pid, signal.SIGCONT, reach)
        elif rng.random() < 0.15 and number in ENDING:
            time.sleep(rng.random())
            send(pid, number, reach)
        known |= set(family(pid))
        code = end_of(pid)
        what = f"{kind} {number.name} to {reach} after {moment:.2f} of {seconds:.1f} s: exit code {code}"
        said = log.read_text()
        time.sleep(0.1)
        wrong = []
        if "Traceback" in said or code is None or code not in ((0, 3) if number in ENDING else (0,)):
            wrong.append(f"said {said[-3000:]}")
        deadline = time.monotonic() + 6
        while (left := [one for one in known - {pid} if one in processes()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            wrong.append(f"processes left: {left}")
        if code:
            again = ["resume", str(run)] if (run / "run.json").exists() or (run / "stages.json").exists() else words
            if code == 3 and again[0] == "resume" and not HOW.search(said):
                wrong.append(f"does not say how to continue: {said[-1500:]}")
            if end_of(start(again, log, cache)) != 0:
                wrong.append(f"{again} fails: {log.read_text()[-3000:]}")
        if weights(run) != wanted:
            wrong.append(f"other weights: {weights(run)} instead of {wanted}")
        return f"WRONG: {what}: {'; '.join(wrong)}" if wrong else what


def run(folder: Path, count: int, seed: int, kinds: tuple[str, ...]) -> int:
    rng = random.Random(seed)
    bench, wrong = Bench(folder, rng), 0
    for number in range(count):
        said = bench.try_one(kinds[number % len(kinds)], f"run{number}")
        wrong += said.startswith("WRONG")
        print(said, flush=True)
    print(f"{count} signals, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="working folder, which is kept (default: a temporary folder)")
    parser.add_argument("--only", choices=KINDS)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        given = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given.mkdir(parents=True, exist_ok=True)
        sys.exit(run(given, options.count, options.seed, (options.only,) if options.only else KINDS))
