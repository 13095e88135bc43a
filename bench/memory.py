"""Compare the memory that `tunesmith train` announces with what it takes: kinds of runs on the CPU.

    python bench/memory.py --data alpaca.json --tokenizer TOKENIZER --large-tokenizer QWEN [--only LoRA] [--docs docs]

Each case is a short run in a process of its own. Announced is the line `memory` of the summary; measured is the largest
resident size of the process until its last step, as the operating system counts it. What comes after maps files, which
the system may drop when it needs room; the peak to the end of the process is given beside it. Prints a table, and
writes memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from compare_inputs import read_pairs, write_model, write_rows

CHILD = """
import sys
from tunesmith.cli import main
from tunesmith.monitor.memory import process_memory
code = main(sys.argv[1:])
print(f"PEAK {process_memory()[1]:.0f}", flush=True)
sys.exit(code)
"""
FP32, BF16 = (["--train.precision", name] for name in ("fp32", "bf16"))
LORA = ["--lora.kind", "lora", "--lora.rank", "16"]
TOKENS = ["--train.micro_batch_tokens"]
CASES: dict[str, tuple[str, list[str]]] = {
    "26M, all weights": ("26m", []),
    "26M, 4 forwards a step": ("26m", ["--train.grad_accum_steps", "4", *TOKENS, "1024", "--data.max_seq_len", "1024"]),
    "26M, 8,192 tokens a forward": ("26m", [*TOKENS, "8192"]),
    "26M, checkpointing": ("26m", ["--train.gradient_checkpointing", "true", *TOKENS, "8192"]),
    "26M, LoRA": ("26m", LORA),
    "26M, bf16": ("26m", BF16),
    "26M, mixture of 4 experts": ("moe", []),
    "26M, documents of 4,096 tokens": ("26m-growth", [*TOKENS, "4096", "--data.max_seq_len", "4096"]),
    "GPT-2 small, all weights": ("gpt2", [*TOKENS, "1024"]),
    "0.5B shape of 4 layers, all weights": ("qwen2.5-0.5b-4-layers", []),
    "0.5B shape of 4 layers, bf16": ("qwen2.5-0.5b-4-layers", BF16),
    "0.5B shape of 4 layers, LoRA": ("qwen2.5-0.5b-4-layers", LORA),
    "0.5B shape of 4 layers, LoRA on NF4": ("qwen2.5-0.5b-4-layers", [*LORA, "--lora.quantize", "nf4"]),
    "0.5B shape of 4 layers, LoRA on int8": ("qwen2.5-0.5b-4-layers", [*LORA, "--lora.quantize", "int8"]),
    "100M, all weights": ("100m", []),
    "1M, all weights": ("1m", []),
}
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def run_case(words: list[str], model: Path, rows: Path, output: Path, steps: int, threads: int) -> dict[str, float]:
    """Bytes announced and measured."""
    line = ["train", "--model", str(model), "--data", str(rows), "--output", str(output), "--train.max_steps", str(steps),
            "--train.log_steps", "1", "--train.save_steps", "1"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TUNESMITH_CACHE": str(output.parent / "cache"),
           "HF_HUB_OFFLINE": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CHILD, *line, *words], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(
            f"tunesmith {' '.join(line + words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    said = re.search(r"^memory +about ([\d.]+) (\w+)(.*)", done.stdout, re.M)
    peak = re.search(r"^PEAK (\d+)", done.stdout, re.M)
    assert said
    assert peak
    in_steps = [json.loads(one).get("memory_gb", 0) for one in (output / "metrics.jsonl").read_text().splitlines()]
    return {"announced": float(said[1]) * _UNITS[said[2]], "measured": 1e9 * max(in_steps), "to_the_end": float(peak[1]),
            "parts": said[3].partition(": ")[2]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of Alpaca's form; default: generated rows")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: one made of a few words")
    parser.add_argument("--large-tokenizer", type=Path, help="for the shapes of Qwen, which need a tokenizer of Qwen")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="cases with TEXT in their name; the others stay in memory.json as they are",
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--smallest", action="store_true", help="one case with a tiny model, to try the script")
    parser.add_argument("--docs", type=Path, help="folder for memory.json")
    args = parser.parse_args()
    cases = {"smallest": ("smallest", [])} if args.smallest else CASES
    kept = args.docs / "memory.json" if args.docs and args.only else None
    found = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.exists() else {}
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        rows = write_rows(folder / "rows.jsonl", read_pairs(args.data))
        print(f"{'case':<40}{'announced':>12}{'measured':>12}{'error':>8}", flush=True)
        for number, (case, (shape, words)) in enumerate(cases.items()):
            if args.only not in case:
                continue
            model = folder / f"model-{shape}"
            if not model.exists():
                write_model(model, shape, args.large_tokenizer if shape.startswith("qwen") else args.tokenizer)
            words = words if words is BF16 else [*FP32, *words]
            one = run_case(words, model, rows, folder / f"run-{number}", args.steps, args.threads)
            error = one["announced"] / one["measured"] - 1
            found[case] = {**one, "error": error}
            print(f"{case:<40}{one['announced'] / 1e6:>9,.0f} MB{one['measured'] / 1e6:>9,.0f} MB{error:>+8.0%}"
                  f"  ({one['to_the_end'] / 1e6:,.0f} to the end; {one['parts']})", flush=True)  # fmt: skip
    if args.docs:
        (args.docs / "memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
