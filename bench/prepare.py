"""Prepare many short rows: time, memory, a kill in the middle, and a second start.

    python bench/prepare.py --shared ../shared --folder /tmp/prepare --rows 1000 10000 100000 1000000 5000000

Rows are those of GSM8K with up to 290 characters, each many times with other digits and a number of its own; 5 million
of them are a file of about 1.7 GB. Each size is prepared from nothing. Where it takes long enough it is killed (SIGKILL)
in the middle and started again; then it is started once more, and finds what is there.

With --start instead: how long `tunesmith train` takes for one step of a tiny model, at a first and at a second start.

Memory is the largest sum, over all processes of the preparation, of the proportional set size (PSS in
/proc/PID/smaps_rollup, which counts a page that several share once), looked at five times a second. Pages of the files
that are written are not part of it; pages of memory maps are. Writes docs/prepare.json and docs/prepare.svg with --docs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHILD = """
import datetime, json, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from tunesmith.config.data_keys import DataSection
from tunesmith.data.dataset import find_data, refuse_shared_files
from tunesmith.files import spell_sealed, write_text_atomic
from tunesmith.model.tokenizer import build_encoder
from tunesmith.preparation.cache import hash_data_file
from tunesmith.preparation.write import write_dataset
from tunesmith.run.console import ConsoleReporter
from tunesmith.runfolder import RunFolder

tokenizer, file, folder, workers = sys.argv[1:]
encoder = build_encoder(AutoTokenizer.from_pretrained(tokenizer), None, {}, datetime.datetime(2026, 1, 2))
data = DataSection(train=[file], cache=True, workers=workers if workers == "auto" else int(workers))
began = time.perf_counter()
print(f"imports and tokenizer: {time.process_time():.1f} s of processor time", flush=True)
sources = find_data(data)
refuse_shared_files(sources)
run = RunFolder(Path(folder))
run.path.mkdir()
dataset = write_dataset(data, sources, encoder, 512, 0, run, ConsoleReporter())
prepared = time.perf_counter() - began
hash_data_file(Path(file))
write_text_atomic(run.ledger, spell_sealed(dataset.ledger_json(encoder, encoder.defaults.date)))
done = {"rows": dataset.ledger.rows, "tokens": dataset.ledger.tokens, "samples": len(dataset.train),
        "prepared_s": prepared, "all_s": time.perf_counter() - began}
print("RESULT " + json.dumps(done), flush=True)
"""


def write_rows(source: Path, path: Path, count: int) -> None:
    """Varied rows of a JSON Lines file with questions and answers."""
    known = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)
    bodies = []
    for _ in range(20):
        digits = str.maketrans("123456789", "".join(rng.sample("123456789", 9)))
        for row in known:
            if len(row["question"]) + len(row["answer"]) <= 290:
                question, answer = (json.dumps(row[key])[1:].translate(digits) for key in ("question", "answer"))
                bodies.append((question, answer))
    rng.shuffle(bodies)
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, count, 10_000):
            file.writelines(
                f'{{"messages": [{{"role": "user", "content": "Problem {number}. {question}}}, '
                f'{{"role": "assistant", "content": "{answer}}}]}}\n'
                for number in range(first, min(count, first + 10_000))
                for question, answer in [bodies[number % len(bodies)]]
            )


def tree_of(pid: int) -> list[int]:
    """A process and all that it has started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def memory_mb(pid: int) -> float:
    total = 0
    for one in tree_of(pid):
        with contextlib.suppress(OSError, IndexError):
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += int(text.split("\nPss:")[1].split()[0])
    return total / 1000


def run_child(words: list[str], cache: Path, kill_after_s: float | None = None) -> dict[str, Any] | None:
    """Prepare in a process of its own; None if it was killed."""
    env = {**os.environ, "TUNESMITH_CACHE": str(cache)}
    output = cache.parent / "output.txt"
    with output.open("w") as file:
        child = subprocess.Popen([sys.executable, "-c", CHILD, *words], stdout=file, env=env)
    began, peak = time.monotonic(), 0.0
    while child.poll() is None:
        peak = max(peak, memory_mb(child.pid))
        if kill_after_s is not None and time.monotonic() - began > kill_after_s:
            child.send_signal(signal.SIGKILL)
            child.wait()
            return None
        time.sleep(0.2)
    text = output.read_text()
    for line in text.splitlines():
        if line.startswith("RESULT "):
            return {
                **json.loads(line[7:]),
                "peak_mb": round(peak),
                "notes": [n for n in text.splitlines() if "note" in n],
            }
    raise SystemExit(f"the preparation failed:\n{text}")


def hashes_of(folder: Path) -> str:
    return json.loads((folder / "data_ledger.json").read_text(encoding="utf-8"))["sha256"] + "".join(
        subprocess.run(["sha256sum", str(path)], capture_output=True, text=True).stdout[:64]
        for path in sorted((folder / "tokens").iterdir())
    )


def measure(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """All starts of one size."""
    folder: Path = args.folder
    file = folder / "rows.jsonl"
    began = time.perf_counter()
    write_rows(args.shared / "data" / "gsm8k" / "train.jsonl", file, count)
    size = file.stat().st_size
    print(f"{count:,} rows, {size / 1e9:.2f} GB, made in {time.perf_counter() - began:.0f} s", flush=True)
    time.sleep(2.1)  # a file that is younger is hashed at each start
    words = [str(args.tokenizer or args.shared / "tokenizers" / "minimind"), str(file)]
    first = run_child([*words, str(folder / "first"), args.workers], folder / "cache")
    assert first is not None
    found: dict[str, Any] = {
        "rows": count, "bytes": size, "tokens": first["tokens"], "seconds": round(first["prepared_s"], 1),
        "rows_per_s": round(count / first["prepared_s"]), "peak_mb": first["peak_mb"],
    }  # fmt: skip
    print(f"  prepared: {found}", flush=True)
    second = run_child([*words, str(folder / "second"), args.workers], folder / "cache")
    assert second is not None
    found["second_start_s"], found["second_peak_mb"] = round(second["all_s"], 2), second["peak_mb"]
    print(f"  second start: {second['all_s']:.2f} s, {second['peak_mb']} MB {second['notes']}", flush=True)
    if args.kill and first["prepared_s"] > 40:
        shutil.rmtree(folder / "cache")
        run_child([*words, str(folder / "killed"), args.workers], folder / "cache", 10 + 0.6 * first["prepared_s"])
        last = run_child([*words, str(folder / "last"), args.workers], folder / "cache")
        assert last is not None
        assert hashes_of(folder / "first") == hashes_of(folder / "last")
        found["after_kill_s"] = round(last["prepared_s"], 1)
        print(f"  killed and continued: {last['prepared_s']:.0f} s, the same files {last['notes']}", flush=True)
    for name in ("first", "second", "killed", "last", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    file.unlink()
    return found


def measure_start(args: argparse.Namespace, count: int) -> None:
    """Seconds of `tunesmith train` with one step, without and with prepared data."""
    folder: Path = args.folder
    file = folder / f"start-{count}.jsonl"
    write_rows(args.shared / "data" / "gsm8k" / "train.jsonl", file, count)
    time.sleep(2.1)
    tokenizer = str(args.tokenizer or args.shared / "tokenizers" / "minimind")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    flags = [word for key, value in sizes.items() for word in (f"--model.config.{key}", str(value))]
    for name in ("nothing prepared", "prepared"):
        run = folder / f"run-{count}"
        shutil.rmtree(run, ignore_errors=True)
        began = time.perf_counter()
        words = ["train", "--model", "new:minimind-26m", "--tokenizer", tokenizer, "--data", str(file), *flags]
        subprocess.run(
            [sys.executable, "-m", "tunesmith", *words, "--output", str(run), "--train.max_steps", "1"],
            env={**os.environ, "TUNESMITH_CACHE": str(folder / "cache")}, check=True, capture_output=True,
        )  # fmt: skip
        print(f"{count:,} rows, {name}: {time.perf_counter() - began:.1f} s from the command to its end", flush=True)


def picture(sizes: list[dict[str, Any]]) -> str:
    """Rows per second and memory against rows, both from zero, over a logarithmic axis of rows."""
    from math import log10

    width, height, left, gap = 640, 200, 70, 70
    low, high = log10(sizes[0]["rows"]), log10(sizes[-1]["rows"])

    def across(rows: float) -> float:
        return left + (log10(rows) - low) / (high - low or 1) * (width - left - 30)

    parts = []
    for place, (key, title) in enumerate((("rows_per_s", "rows per second"), ("peak_mb", "peak memory, MB"))):
        top, most = 30 + place * (height + gap), max(size[key] for size in sizes) * 1.15
        points = [(across(size["rows"]), top + height * (1 - size[key] / most), size) for size in sizes]
        parts.append(f'<text x="{left}" y="{top - 10}" class="title">{title}</text>')
        parts.append(f'<path d="M{left},{top} V{top + height} H{width - 20}" class="axis"/>')
        parts.append(f'<polyline points="{" ".join(f"{x:.0f},{y:.0f}" for x, y, _ in points)}" class="line"/>')
        for x, y, size in points:
            parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3.5"/>')
            parts.append(f'<text x="{x:.0f}" y="{y - 9:.0f}" class="mid">{size[key]:,}</text>')
            parts.append(f'<text x="{x:.0f}" y="{top + height + 18}" class="mid">{size["rows"]:,}</text>')
    style = (
        "text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.mid{text-anchor:middle}"
        ".axis{stroke:#999;fill:none}.line{stroke:#2563a8;stroke-width:2;fill:none}circle{fill:#2563a8}"
    )
    whole = f"0 0 {width} {2 * (height + gap) + 10}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{whole}" role="img" aria-label="Preparation: rows per second '
        f'and peak memory against rows"><style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/gsm8k and tokenizers/minimind")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="for temporary files; must not exist")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--kill", action="store_true", help="also kill a preparation and continue it")
    parser.add_argument("--start", action="store_true", help="only measure how long `train` takes to its first step")
    parser.add_argument("--docs", type=Path, help="folder for prepare.json and prepare.svg")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        if args.start:
            for count in args.rows:
                measure_start(args, count)
            return
        sizes = [measure(args, count) for count in args.rows]
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    if args.docs:
        machine = f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, data.workers {args.workers}"
        (args.docs / "prepare.json").write_text(json.dumps({"machine": machine, "sizes": sizes}, indent=1) + "\n")
        (args.docs / "prepare.svg").write_text(picture(sizes))


if __name__ == "__main__":
    main()
