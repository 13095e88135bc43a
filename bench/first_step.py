"""Time to the first step: `tunesmith train` as a whole process, against what importing torch and transformers takes.

    python bench/first_step.py --data rows.jsonl --tokenizer TOKENIZER [--before COMMIT]

A model of 26 million parameters (new:minimind-26m) is trained for one step on the first 2,000 rows. Processes run in
turn: one that only imports torch and transformers, one that also imports a model's class, and one for each version of
the code; the first of each is not counted. Given are medians of seconds from the start of the process: until the first
output, until the first lines about the run, and until the step is logged; and what is left of the last without the
imports of torch and transformers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows_per_s import unpack

HERE = Path(__file__).resolve().parent
IMPORTS = "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer"
MODEL_CODE = "import torch; from transformers import LlamaForCausalLM, AutoTokenizer"  # which the names above leave out


def time_imports(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def time_run(words: list[str], sources: Path, run: Path) -> tuple[float, float, float]:
    """Seconds until the first output, the lines about the run, and the step."""
    shutil.rmtree(run, ignore_errors=True)
    env = {**os.environ, "PYTHONPATH": str(sources), "TUNESMITH_CACHE": str(run.parent / "cache")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled, as torch and transformers are
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "train", *words, "--output", str(run)], stdout=subprocess.PIPE, text=True,
        env=env,
    )  # fmt: skip
    assert child.stdout is not None
    first = lines = None
    for line in child.stdout:
        now = time.perf_counter() - began
        first = first or now
        if line.startswith("model ") and lines is None:
            lines = now
        if line.startswith("step "):
            child.kill()
            child.wait()
            assert lines is not None
            return first, lines, now
    raise SystemExit(f"the run ended without a step (exit code {child.wait()})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--before", metavar="COMMIT", help="compare with the sources of this commit")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--docs", type=Path, help="folder for first_step.json")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="first-") as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        with args.data.open(encoding="utf-8") as source, rows.open("w", encoding="utf-8") as file:
            taken = list(itertools.islice(source, args.rows))
            file.writelines(taken)
        sides = {"ours": HERE.parent / "src"}
        if args.before:
            sides["before"] = unpack(args.before, folder / "before")
        words = ["--model", "new:minimind-26m", "--tokenizer", str(args.tokenizer), "--data", str(rows),
                 "--train.max_steps", "2", "--train.log_steps", "1", *more]  # fmt: skip
        imports: list[float] = []
        model_code: list[float] = []
        found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
        for number in range(1 + args.rounds):
            imported, with_model = time_imports(IMPORTS), time_imports(MODEL_CODE)
            timed = {side: time_run(words, sources, folder / "run") for side, sources in sides.items()}
            if number:
                imports.append(imported)
                model_code.append(with_model)
                for side, seconds in timed.items():
                    found[side].append(seconds)
    imports_s, model_code_s = statistics.median(imports), statistics.median(model_code)
    print(f"importing torch and transformers: {imports_s:.1f} s, with a model's class {model_code_s:.1f} s")
    for side, runs in found.items():
        output, lines, step = (statistics.median(column) for column in zip(*runs, strict=True))
        rest = statistics.median(run[2] - one for run, one in zip(runs, imports, strict=True))
        print(
            f"{side}: first output {output:.1f} s, lines about the run {lines:.1f} s, first step {step:.1f} s, "
            f"{rest:.1f} s more than the imports"
        )
        if side == "ours" and args.docs:
            kept = {"rows": len(taken), "rounds": args.rounds, "imports_s": imports_s, "model_code_s": model_code_s,
                    "first_output_s": output, "first_step_s": step, "after_imports_s": rest}  # fmt: skip
            (args.docs / "first_step.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
