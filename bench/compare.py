"""Compare with other tools: the same rows, weights and hyper-parameters, steps in turn.

    python bench/compare.py --data alpaca.json --tokenizer TOKENIZER --large-tokenizer QWEN \\
        --peers-python PEERS/bin/python --docs docs

Each engine runs its own training loop in a process of its own (compare_engines.py). The steps alternate: one step of
each, in turn, so that whatever else the machine does meets all of them. Given are the median of the ratios of the
rounds, and their quartiles. Without --peers-python only tunesmith is measured. The peers are optional:

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.* transformers==5.23.* peft==0.21.* datasets==5.* trl==1.16.*
    PEERS/bin/pip install --no-deps .      # this repository, whose chat template the rows are rendered with

or, to share the packages of this environment, `pip install --no-deps trl==1.16.*` into it. --minimind CHECKOUT adds
MiniMind's trainer, from a clone of https://github.com/jingyaogong/minimind.

Stages (--stages): steps, prepare, lengths, sizes. `steps` measures speed, memory and the time to the first step;
`lengths` and `sizes` how speed changes with the length of the documents and with the size of the model. Each stage
replaces its part of benchmark.json, from which benchmark.md and the plots are made (--render alone does that). What a
part has found is written at once; an engine that fails is named there, and the others go on.
--data is a file of Alpaca's form (instruction, input, output); without it rows and tokenizer are generated.
All of it takes --budget minutes at most, and a minute or two more. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from compare_inputs import Task, read_pairs
from compare_pages import summary_of, write_pages
from compare_processes import Bench

STAGES = ("steps", "prepare", "lengths", "sizes")
MINUTES = {"prepare": 2.0, "lengths": 5.0, "sizes": 3.5}
WARM_UP, LEAST = 1, 2  # rounds that are not counted, besides each engine's first step, and those that are, at least
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers")


@dataclass(frozen=True, slots=True)
class Case:
    """One table: a shape, and what is trained of it.

    Attributes:
        minutes: of the whole, about.
    """

    shape: str
    method: str
    engines: tuple[str, ...]
    rounds: int
    minutes: float
    tokens: int = 2048


CASES = (
    Case("26m", "full", ("ours", "trl-packed", "trl-padded", "trainer", "ours-auto", "ours-compiled"), 12, 4.5),
    Case("26m", "lora", ("ours", "trl-packed", "ours-auto"), 12, 2.0),
    Case("qwen2.5-0.5b-4-layers", "full", ("ours", "trl-packed"), 6, 3.5),
    Case("qwen2.5-0.5b-4-layers", "lora", ("ours", "trl-packed"), 6, 3.0),
    Case("minimind", "full", ("ours", "minimind"), 6, 2.0),
)
SMALLEST = (
    Case("smallest", "full", ("ours", "trl-packed", "trl-padded", "trainer"), 2, 1.0, 256),
    Case("smallest", "lora", ("ours", "trl-packed"), 2, 1.0, 256),
)
LENGTHS = (64, 8192, 512, 2048, 1024, 4096, 256, 128)
SIZES = ("1m", "4m", "26m-growth", "100m", "500m")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return {"median": statistics.median(ordered), "low": low, "high": high}


def compare_steps(bench: Bench, case: Case) -> dict[str, Any]:
    """Steps in turn."""
    pairs = read_pairs(bench.args.data)
    task = bench.task(f"{case.shape}-{case.method}", case.shape, case.method, case.tokens, pairs)
    with contextlib.ExitStack() as stack:
        engines = bench.start(stack, [*(name for name in case.engines if bench.has(name)), "limit"], task)
        rounds = bench.in_turn(engines, WARM_UP + (bench.args.rounds or case.rounds), WARM_UP + LEAST) - WARM_UP
    limit = engines.pop("limit", None)
    found: dict[str, Any] = {
        "shape": case.shape, "method": case.method, "parameters": bench.parameters(case.shape), "tokens": case.tokens,
        "padded_rows": task.padded_rows, "rounds": rounds, "failed": bench.failed, "engines": {},
    }  # fmt: skip
    if "ours" not in engines:
        return found
    rates = [answer["flops_per_s"] for answer in limit.answers[1:]][WARM_UP:] if limit else []
    if limit:
        found["gflops_per_s"] = spread([rate / 1e9 for rate in rates])
    square = engines["ours"].answers[0]["square"]
    ours = [step["tokens"] / step["seconds"] for step in engines["ours"].answers[1 + WARM_UP :]]
    for name, engine in engines.items():
        counted, first = engine.answers[1 + WARM_UP :], engine.answers[0]
        speeds = [step["tokens"] / step["seconds"] for step in counted]
        one = found["engines"][name] = {
            "tokens_per_s": spread(speeds),
            "ours_over_it": spread([a / b for a, b in zip(ours, speeds, strict=True)]),
            "step_s": spread([step["seconds"] for step in counted]),
            "tokens_per_step": statistics.mean(step["tokens"] for step in counted),
            "targets_per_step": statistics.mean(step["targets"] for step in counted),
            "peak_mb": max(step["peak_mb"] for step in engine.answers),
            "imports_mb": first["imports_mb"],
            "first_step_s": first["since_start_s"], "imports_s": first["imports_s"],
            "data": first["data"],
        }  # fmt: skip
        if limit:
            least = [
                _least_flops(limit.answers[0], step, square) / rate for step, rate in zip(counted, rates, strict=True)
            ]
            one["share_of_limit"] = spread([low / step["seconds"] for low, step in zip(least, counted, strict=True)])
        print(f"  {name}: {one['tokens_per_s']['median']:,.0f} tokens/s", flush=True)
    return found


def _least_flops(limit: dict[str, Any], step: dict[str, Any], square: float) -> float:
    """Of a step: the weights on all tokens, the head on supervised ones, attention within documents."""
    per_token = float(limit["flops_per_token"] + limit["flops_per_square"] * square)
    return per_token * float(step["tokens"]) + float(limit["flops_per_target"]) * float(step["targets"])


def compare_preparation(bench: Bench) -> list[dict[str, Any]]:
    """Rows per second of labelling, in turn."""
    smallest = bench.args.smallest
    pairs = read_pairs(bench.args.data, 64 if smallest else bench.args.prepare_rows)
    shape = "smallest" if smallest else "26m"
    found = []
    for workers in (1, bench.args.threads) if bench.args.threads > 1 else (1,):
        task = bench.task(f"prepare-{workers}", shape, "full", 2048, pairs, workers=workers, steps=1)
        with contextlib.ExitStack() as stack:
            names = [name for name in ("prepare-ours", "prepare-trl") if bench.has(name)]
            engines = bench.start(stack, names, task)
            bench.in_turn(engines, 2 if smallest else 4, 2)
        speeds = {name: [a["rows"] / a["seconds"] for a in one.answers[2:]] for name, one in engines.items()}
        row: dict[str, Any] = {"workers": workers, "rows": len(pairs)}
        for name, values in speeds.items():
            row[name] = spread(values)
            if "prepare-ours" in speeds:
                row[f"ours_over_{name}"] = spread([a / b for a, b in zip(speeds["prepare-ours"], values, strict=True)])
        found.append(row)
        shown = ", ".join(f"{name} {row[name]['median']:,.0f} rows/s" for name in speeds)
        print(f"  {workers} process{'es' if workers > 1 else ''}: {shown}", flush=True)
    return found


def _measure(bench: Bench, names: list[str], task: Task, rounds: int) -> dict[str, Any]:
    """Speed and memory of engines, steps in turn."""
    with contextlib.ExitStack() as stack:
        engines = bench.start(stack, [name for name in names if bench.has(name)], task)
        bench.in_turn(engines, 1 + rounds, 2)
    found: dict[str, Any] = {}
    for name, engine in engines.items():
        steps = engine.answers[2:]
        found[name] = {
            "tokens_per_s": spread([step["tokens"] / step["seconds"] for step in steps]),
            "peak_mb": max(step["peak_mb"] for step in engine.answers),
        }
    return found


def measure_lengths(bench: Bench, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    """Speed against the length of the documents, each forward full; the ends first, then between them."""
    smallest = bench.args.smallest
    shape, tokens = ("smallest", 512) if smallest else ("26m", 8192)
    found: list[dict[str, Any]] = []
    longest_s = 0.0
    for length in (64, 128) if smallest else bench.args.lengths or LENGTHS:
        if len(found) > 1 and not bench.args.lengths and not bench.has_time(longest_s):
            break
        began = time.monotonic()
        texts = _texts_of_length(bench, shape, length, 4 * tokens // length + 8)
        task = bench.task(f"length-{length}", shape, "full", tokens, texts, max_seq_len=tokens)
        row = {"length": length, **_measure(bench, ["ours", "trl-packed"], task, 1 if smallest else 2)}
        _tell(f"{length} tokens", row)
        found.append(row)
        keep(sorted((row for row in found if "ours" in row), key=lambda row: row["length"]))
        longest_s = max(longest_s, time.monotonic() - began)


def _tell(what: str, row: dict[str, Any]) -> None:
    for name, one in row.items():
        if isinstance(one, dict):
            print(f"  {what}, {name}: {one['tokens_per_s']['median']:,.0f} tokens/s", flush=True)


def _texts_of_length(bench: Bench, shape: str, length: int, count: int) -> list[tuple[str, str]]:
    """Rows of about `length` tokens, template included: an answer of repeated sentences."""
    from transformers import AutoTokenizer

    bench.task("lengths", shape, "full", 512, [("a", "b")])
    tokenizer = AutoTokenizer.from_pretrained(bench.folder / f"model-{shape}")
    answers = [answer for _, answer in read_pairs(bench.args.data)]
    around = len(tokenizer("<|im_start|>user\nRow 00000<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n").input_ids)
    stream: list[int] = []
    rows = []
    place = 0
    for number in range(count):
        room = max(1, length - around)
        while len(stream) < room:
            stream += tokenizer(answers[place % len(answers)] + " ").input_ids
            place += 1
        piece, stream = stream[:room], stream[room:]
        rows.append((f"Row {number:05d}", tokenizer.decode(piece, skip_special_tokens=True) or "a"))
    return rows


def measure_sizes(bench: Bench, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    """Speed against the size of the model."""
    smallest = bench.args.smallest
    found: list[dict[str, Any]] = []
    pairs = read_pairs(bench.args.data)
    for shape in ("smallest",) if smallest else SIZES:
        if len(found) > 2 and not bench.has_time(60.0):
            break
        tokens = 256 if smallest else 2048 if shape != "500m" else 1024
        task = bench.task(f"size-{shape}", shape, "full", tokens, pairs)
        measured = _measure(bench, ["ours"], task, 1 if smallest or shape == "500m" else 3)
        row = {"parameters": bench.parameters(shape), "tokens": tokens, **measured}
        _tell(f"{row['parameters']:,} parameters", row)
        found.append(row)
        keep([row for row in found if "ours" in row])


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """Processor, memory and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    has = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    versions = {name: _version(name) for name in PACKAGES}
    if args.peers_python is not None:
        code = "import importlib.metadata as m, json, sys; print(json.dumps([_v(n) for n in sys.argv[1:]]))"
        code = "def _v(n):\n try: return m.version(n)\n except Exception: return None\n" + code
        with contextlib.suppress(OSError, ValueError):  # each of its engines will be named as failed
            done = subprocess.run([args.peers_python, "-c", code, *PACKAGES], capture_output=True, text=True)
            versions |= {name: one for name, one in zip(PACKAGES, json.loads(done.stdout), strict=True) if one}
    return {
        "processor": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": args.threads,
        "instructions": has, "python": platform.python_version(), "system": platform.system(),
        "versions": {name: one for name, one in versions.items() if one}, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def list_parts(args: argparse.Namespace) -> list[tuple[str, Case | None, float]]:
    """Stage, case, and the weight of its time."""
    parts: list[tuple[str, Case | None, float]] = []
    for stage in args.stages:
        if stage == "steps":
            cases = [
                case for case in (SMALLEST if args.smallest else CASES) if args.only in f"{case.shape} {case.method}"
            ]
            parts += [("steps", case, case.minutes) for case in cases if case.shape != "minimind" or args.minimind]
        else:
            parts.append((stage, None, MINUTES[stage]))
    return parts


def run_parts(args: argparse.Namespace, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """All parts; what each has found is kept at once, and a part that fails is named."""
    parts = list_parts(args)
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        bench = Bench(args, Path(name), [minutes for _, _, minutes in parts])
        for stage, case, _ in parts:
            began = time.monotonic()
            title = f"{case.shape} {case.method}" if case else stage
            print(f"{title}:", flush=True)
            bench.begin()
            try:
                run_part(bench, stage, case, found, keep)
                found.get("failed", {}).pop(title, None)
            except (Exception, SystemExit) as error:
                found.setdefault("failed", {})[title] = f"{type(error).__name__}: {error}"[:300]
                print(f"  failed: {error}", flush=True)
            keep()
            print(f"  {time.monotonic() - began:.0f} s", flush=True)


def run_part(bench: Bench, stage: str, case: Case | None, found: dict[str, Any], keep: Callable[[], None]) -> None:
    def keep_rows(rows: list[dict[str, Any]]) -> None:
        found[stage] = rows
        keep()

    if case:
        found.setdefault("steps", {})[f"{case.shape} {case.method}"] = compare_steps(bench, case)
    elif stage == "prepare":
        found["prepare"] = compare_preparation(bench)
    elif stage == "lengths":
        others = [row for row in found.get(stage, []) if row["length"] not in (bench.args.lengths or LENGTHS)]
        measure_lengths(bench, lambda rows: keep_rows(sorted([*others, *rows], key=lambda row: row["length"])))
    else:
        measure_sizes(bench, keep_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of Alpaca's form; default: generated rows")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: one made of a few words")
    parser.add_argument("--large-tokenizer", type=Path, help="for the shapes of Qwen, which need a tokenizer of Qwen")
    parser.add_argument("--peers-python", type=Path, help="interpreter of an environment with TRL")
    parser.add_argument("--minimind", type=Path, metavar="CHECKOUT", help="a clone of MiniMind")
    parser.add_argument("--budget", type=float, default=25.0, metavar="MINUTES", help="default 25: with less time, fewer rounds and fewer points")  # fmt: skip
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="of documents, in the stage lengths: these alone; other points of benchmark.json stay")  # fmt: skip
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases of `steps` with TEXT in their name, as `26m lora`"
    )
    parser.add_argument(
        "--engines", nargs="+", metavar="NAME", help="trl-packed, trl-padded, trainer, minimind, ours-auto, ours-compiled, prepare-trl; default: all"
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="rounds of `steps`; default: 4 to 12, more where steps are short")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--prepare-rows", type=int, default=5000, help="rows of the stage prepare; default 5000")
    parser.add_argument("--smallest", action="store_true", help="a tiny model and few rounds, to try the script")
    parser.add_argument("--docs", type=Path, default=Path("."), help="folder for benchmark.json, .md and the plots")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the pages from benchmark.json")
    args = parser.parse_args()
    path = args.docs / "benchmark.json"
    is_all = set(args.stages) == set(STAGES) and not args.only and not args.lengths
    found: dict[str, Any] = {}
    if path.exists() and (args.render or not is_all):
        found = json.loads(path.read_text(encoding="utf-8"))

    def keep() -> None:
        text = json.dumps(found, indent=1) + "\n"
        path.with_suffix(".partial").write_text(text, encoding="utf-8")
        path.with_suffix(".partial").replace(path)
        write_pages(args.docs, found)

    if not args.render:
        found["machine"] = describe_machine(args)
        try:
            run_parts(args, found, keep)
        except KeyboardInterrupt:
            print(f"interrupted; {path} has what was measured", flush=True)
            raise SystemExit(130) from None
    write_pages(args.docs, found)
    print("\n".join(summary_of(found)), flush=True)


if __name__ == "__main__":
    main()
