"""Preparation in rows per second: this checkout, an earlier commit of it and TRL in turn, on the same rows.

    python bench/rows_per_s.py --data alpaca.json --tokenizer TOKENIZER --before HEAD~1 --peers-python PEERS/bin/python

Two data sets are made of a file of Alpaca's form (instruction, input, output): its rows, and chats of three questions
and answers. No two rows are equal. Each side prepares them in a process of its own (compare_engines.py), once without
counting and then --rounds times, one side after the other, so that whatever else the machine does meets all of them.
Given are the medians of rows per second, and of the ratios of the rounds with their quartiles, with one process and with
all cores. For the environment with TRL see compare.py; TRL proves nothing and packs nothing here. --json FILE keeps it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare import spread
from compare_inputs import Task, read_pairs, write_model
from compare_processes import started

HERE = Path(__file__).resolve().parent
TURNS = {"alpaca": 1, "chats of three turns": 3}


def write_chats(path: Path, pairs: list[tuple[str, str]], turns: int, count: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = []
            for turn in range(turns):
                question, answer = pairs[(number * turns + turn) % len(pairs)]
                question = question if turn else f"Question {number}. {question}"
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def unpack(revision: str, folder: Path) -> Path:
    """The sources of a commit."""
    folder.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(HERE.parent), "archive", revision, "src"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder / "src"


def measure(sides: dict[str, tuple[str, Path, Path | None]], task: Task, rounds: int) -> dict[str, Any]:
    """Rows per second of each side, and how many times as many the first one has."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    with contextlib.ExitStack() as stack:
        engines = {}
        for name, (engine, python, sources) in sides.items():
            own = replace(task, name=f"{task.name}-{name}")
            env = {"PYTHONPATH": str(sources)} if sources else {}
            engines[name] = stack.enter_context(started(name, python, engine, own, env))
        for number in range(1 + rounds):
            for name, engine in list(engines.items())[:: 1 if number % 2 else -1]:
                answer = engine.go()
                if number:
                    speeds[name].append(answer["rows"] / answer["seconds"])
    ours = next(iter(speeds.values()))
    return {
        name: {"rows_per_s": spread(own), "ratio": spread([a / b for a, b in zip(ours, own, strict=True)])}
        for name, own in speeds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of Alpaca's form; default: generated rows")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: one made of a few words")
    parser.add_argument("--before", metavar="COMMIT", help="compare with the sources of this commit")
    parser.add_argument("--peers-python", type=Path, help="interpreter of an environment with TRL")
    parser.add_argument("--rows", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure only what has TEXT in its name")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    pairs = read_pairs(args.data)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rows-") as name:
        folder = Path(name)
        write_model(folder / "model", "smallest", args.tokenizer)
        python = Path(sys.executable)
        sides: dict[str, tuple[str, Path, Path | None]] = {"ours": ("prepare-ours", python, HERE.parent / "src")}
        if args.before:
            sides["before"] = ("prepare-ours", python, unpack(args.before, folder / "before"))
        if args.peers_python:
            sides["trl"] = ("prepare-trl", args.peers_python, None)
        for data, turns in TURNS.items():
            rows = write_chats(folder / f"rows-{turns}.jsonl", pairs, turns, args.rows)
            for workers in dict.fromkeys((1, os.cpu_count() or 1)):
                title = f"{data}, {workers} process{'es' * (workers > 1)}"
                if args.only not in title:
                    continue
                task = Task(
                    f"{turns}-{workers}", str(folder / "model"), str(rows), str(folder), "smallest", "full", 2048, 2048,
                    1, 1, workers,
                )  # fmt: skip
                found[title] = measure(sides, task, args.rounds)
                for side, own in found[title].items():
                    ratio = own["ratio"]
                    print(
                        f"{title}: {side} {own['rows_per_s']['median']:,.0f} rows/s, ours over it "
                        f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})", flush=True,
                    )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
