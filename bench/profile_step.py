"""What a training step spends its time on, by kind of operation, from the trace of train.profile_steps.

    python bench/profile_step.py --data alpaca.json --tokenizer TOKENIZER [--shape 26m] [--docs docs]

Steps 4 to 6 of all weights and of LoRA, fp32, 2,048 tokens a step. The time of an operation is that of its own, without
those it calls. Prints a table, and writes profile.json, which compare.py puts on its page.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compare_inputs import read_pairs, write_model, write_rows

KINDS = (  # first that is in the name
    ("attention within documents", ("attention",)),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn", "aten::linear", "aten::addmv")),
    ("optimizer and clipping", ("adamw", "vector_norm", "foreach", "Optimizer")),
    ("memory: copies and zeros", ("copy", "fill", "zero", "cat", "empty", "contiguous", "clone")),
    ("softmax and loss of the head", ("softmax", "nll_loss", "scatter", "exp_")),
    ("activations, norms, rotary embedding", ("aten::", "Norm", "SwiGLU", "Lora", "Backward")),
)
METHODS: dict[str, list[str]] = {"all weights": [], "LoRA": ["--lora.kind", "lora", "--lora.rank", "16"]}


def own_times(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """Microseconds of each operation without those within it."""
    found: Counter[str] = Counter()
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") == "cpu_op":
            threads.setdefault(event["tid"], []).append(event)
    for own in threads.values():
        open_events: list[dict[str, Any]] = []
        for event in sorted(own, key=lambda event: (event["ts"], -event["dur"])):
            while open_events and open_events[-1]["ts"] + open_events[-1]["dur"] <= event["ts"]:
                open_events.pop()
            if open_events:
                found[open_events[-1]["name"]] -= event["dur"]
            found[event["name"]] += event["dur"]
            open_events.append(event)
    return found


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")


def profile(words: list[str], model: Path, rows: Path, run: Path) -> dict[str, float]:
    """Share of each kind, the largest first."""
    line = ["train", "--model", str(model), "--data", str(rows), "--output", str(run), "--train.max_steps", "6",
            "--train.precision", "fp32", "--train.profile_steps", "4-6", *words]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TUNESMITH_CACHE": str(run.parent / "cache")}
    done = subprocess.run([sys.executable, "-m", "tunesmith", *line], capture_output=True, text=True, env=env)
    traces = list((run / "profile").glob("*.json.gz"))
    if done.returncode or not traces:
        raise SystemExit(f"tunesmith {' '.join(line)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    with gzip.open(traces[0], "rt", encoding="utf-8") as file:
        times = own_times(json.load(file)["traceEvents"])
    kinds: Counter[str] = Counter()
    for name, microseconds in times.items():
        kinds[kind_of(name)] += microseconds
    total = sum(kinds.values())
    return {kind: microseconds / total for kind, microseconds in kinds.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of Alpaca's form; default: generated rows")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: one made of a few words")
    parser.add_argument("--shape", default="26m", help="of compare.py; default 26m")
    parser.add_argument("--docs", type=Path, help="folder for profile.json")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="profile-") as name:
        folder = Path(name)
        rows = write_rows(folder / "rows.jsonl", read_pairs(args.data))
        write_model(folder / "model", args.shape, args.tokenizer)
        for number, (method, words) in enumerate(METHODS.items()):
            found[method] = profile(words, folder / "model", rows, folder / f"run-{number}")
            print(f"{args.shape}, {method}:")
            for kind, share in found[method].items():
                print(f"  {share:>5.1%}  {kind}")
    if args.docs:
        (args.docs / "profile.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
