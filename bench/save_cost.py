"""Cost of a checkpoint: steps during a save compared with steps without, and its share of a run at the default interval.

Each round trains the model twice with the command, once with one save after the warm-up steps and once without, and
records when each step's line is printed. Prints medians over all rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIN_WARM_UP = 4
DEFAULT_SAVE_STEPS, DEFAULT_SAVE_S = 500, 600.0  # whichever comes first


def time_steps(words: list[str], steps: int, folder: Path, saves: bool) -> list[float]:
    """Seconds of each step after the warm-up; the first one includes the snapshot, if one is made."""
    warm_up = max(MIN_WARM_UP, steps)  # so that the save after the next `warm_up` steps is not timed
    run = ["train", *words, "--output", str(folder), "--train.log_steps", "1", "--train.max_steps", str(warm_up + steps),
           "--train.save_steps", str(warm_up if saves else 10**6), "--train.save_minutes", "null"]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *run], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout
    moments, lines = [], []
    for line in child.stdout:
        lines.append(line)
        if line.startswith("step "):
            moments.append(time.perf_counter())
    if child.wait():
        raise SystemExit("".join(lines))
    return [after - before for before, after in zip(moments[warm_up - 1 :], moments[warm_up:], strict=False)]


def measure(words: list[str], rounds: int, steps: int, folder: Path) -> str:
    beside, without = [], []
    for number in range(rounds):
        beside.append(time_steps(words, steps, folder / f"saved-{number}", saves=True))
        without.append(time_steps(words, steps, folder / f"plain-{number}", saves=False))
    step = statistics.median(second for seconds in without for second in seconds)
    slow = statistics.median(second for seconds in beside for second in seconds)
    cost = statistics.median(sum(one) - sum(other) for one, other in zip(beside, without, strict=True))
    interval = min(DEFAULT_SAVE_S, DEFAULT_SAVE_STEPS * step)
    return (
        f"{os.cpu_count()} CPU cores: a step takes {step:.2f} s without a save and {slow:.2f} s beside one (x "
        f"{slow / step:.2f}); a save costs {cost:.1f} s in all, {cost / interval:.1%} of the {interval:.0f} s between "
        "two by default"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="tokenizer folder")
    parser.add_argument("data", help="file of chats")
    parser.add_argument("--model", default="new:minimind-26m", help="default new:minimind-26m")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--steps", type=int, default=6, help="steps after the save that are timed (default 6)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per step (default 1024)")
    options = parser.parse_args()
    words = ["--model", options.model, "--tokenizer", options.tokenizer, "--data", options.data, "--data.max_seq_len",
             str(options.tokens // 2), "--train.micro_batch_tokens", str(options.tokens)]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        print(measure(words, options.rounds, options.steps, Path(temporary)))


if __name__ == "__main__":
    main()
