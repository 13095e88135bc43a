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
`lengths` and `sizes` how tunesmith's speed changes with the length of the documents and with the size of the model.
Each stage replaces its part of benchmark.json, from which the table and the plots are made (--render alone does that).
--data is a file of Alpaca's form (instruction, input, output); without it rows and tokenizer are generated.
All of it takes about 20 minutes on two cores. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from compare_inputs import Task, mean_tokens, read_pairs, write_minimind, write_model, write_rows
from compare_pages import write_pages

HERE = Path(__file__).resolve().parent
STAGES = ("steps", "prepare", "lengths", "sizes")
PEERS = {"trl-packed", "trl-padded", "prepare-trl"}
WARM_UP = 2  # rounds that are not counted
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers")


@dataclass(frozen=True, slots=True)
class Case:
    """One table: a shape, and what is trained of it."""

    shape: str
    method: str
    engines: tuple[str, ...]
    rounds: int
    tokens: int = 2048


CASES = (
    Case("26m", "full", ("ours", "trl-packed", "trl-padded", "trainer"), 10),
    Case("26m", "lora", ("ours", "trl-packed"), 12),
    Case("minimind", "full", ("ours", "minimind"), 5),
    Case("qwen2.5-0.5b-4-layers", "full", ("ours", "trl-packed"), 4),
    Case("qwen2.5-0.5b-4-layers", "lora", ("ours", "trl-packed"), 5),
)
SMALLEST = (
    Case("smallest", "full", ("ours", "trl-packed", "trl-padded", "trainer"), 2, 256),
    Case("smallest", "lora", ("ours", "trl-packed"), 2, 256),
)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
SIZES = ("1m", "4m", "26m-growth", "100m", "500m")


@dataclass
class Engine:
    """A process of compare_engines.py."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    answers: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{self.log.read_text(errors='replace')[-3000:]}")
        self.answers.append(json.loads(line))
        return self.answers[-1]

    def go(self) -> dict[str, Any]:
        self.write("go")
        return self.read()

    def write(self, word: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()

    def end(self) -> None:
        self.write("end")
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Bench:
    """The folder of a measurement, and the interpreters."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self._models: dict[str, int] = {}
        self._checkout = ""

    def task(self, name: str, shape: str, method: str, tokens: int, pairs: list[tuple[str, str]], **more: Any) -> Task:
        """The inputs of engines, written to the folder."""
        model = self.folder / f"model-{shape}"
        if shape == "minimind" and shape not in self._models:
            copy, self._models[shape] = write_minimind(self.args.minimind, model, self.folder, 512, 8)
            self._checkout = str(copy)
        elif shape not in self._models:
            self._models[shape] = write_model(model, shape, self.tokenizer_of(shape))
        rows = write_rows(self.folder / f"rows-{name}.jsonl", pairs)
        padded = max(1, round(tokens / mean_tokens(model, pairs)))
        task = Task(
            name, str(model), str(rows), str(self.folder), shape, method, tokens, more.pop("max_seq_len", tokens), padded,
            **{"steps": 1000, "checkout": self._checkout, **more},
        )  # fmt: skip
        task.write()
        return task

    def tokenizer_of(self, shape: str) -> Path | None:
        is_large = shape.startswith("qwen") and self.args.large_tokenizer
        found: Path | None = self.args.large_tokenizer if is_large else self.args.tokenizer
        return found

    def parameters(self, shape: str) -> int:
        return self._models[shape]

    def has(self, engine: str) -> bool:
        is_wanted = engine == "ours" or not self.args.engines or engine in self.args.engines
        return is_wanted and (engine not in PEERS or self.args.peers_python is not None)

    @contextlib.contextmanager
    def engine(self, name: str, task: Task) -> Iterator[Engine]:
        """An engine that has made its first step."""
        python = self.args.peers_python if name in PEERS else sys.executable
        log = self.folder / f"{task.name}-{name}.log"
        own = replace(task, name=f"{task.name}-{name}").write()
        env = {
            **os.environ, "COMPARE_BEGAN": repr(time.time()), "OMP_NUM_THREADS": str(self.args.threads),
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TUNESMITH_CACHE": str(self.folder / "cache" / own.stem),
        }  # fmt: skip
        with log.open("w") as file:
            process = subprocess.Popen(
                [str(python), str(HERE / "compare_engines.py"), name, str(own)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=file, text=True, env=env,
            )  # fmt: skip
        engine = Engine(name, process, log)
        try:
            engine.read()
            yield engine
        finally:
            engine.end()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return {"median": statistics.median(ordered), "low": low, "high": high}


def compare_steps(bench: Bench, case: Case) -> dict[str, Any]:
    """Steps in turn; the order changes from round to round."""
    pairs = read_pairs(bench.args.data)
    task = bench.task(f"{case.shape}-{case.method}", case.shape, case.method, case.tokens, pairs)
    names = [*(name for name in case.engines if bench.has(name)), "limit"]
    with contextlib.ExitStack() as stack:
        engines = {name: stack.enter_context(bench.engine(name, task)) for name in names}
        rounds = bench.args.rounds or case.rounds
        for number in range(WARM_UP + rounds):
            order = names[number % len(names) :] + names[: number % len(names)]
            for name in order:
                engines[name].go()
    limit = engines.pop("limit")
    rates = [answer["flops_per_s"] for answer in limit.answers[1:]][WARM_UP:]
    square = engines["ours"].answers[0]["square"]
    found: dict[str, Any] = {
        "shape": case.shape, "method": case.method, "parameters": bench.parameters(case.shape), "tokens": case.tokens,
        "padded_rows": task.padded_rows, "rounds": rounds, "gflops_per_s": spread([rate / 1e9 for rate in rates]),
        "engines": {},
    }  # fmt: skip
    ours = None
    for name, engine in engines.items():
        counted = engine.answers[1 + WARM_UP :]
        speeds = [step["tokens"] / step["seconds"] for step in counted]
        ours = ours or speeds
        least = [
            (limit.answers[0]["flops_per_token"] * step["tokens"]
             + limit.answers[0]["flops_per_target"] * step["targets"]
             + limit.answers[0]["flops_per_square"] * square * step["tokens"]) / rate
            for step, rate in zip(counted, rates, strict=True)
        ]  # fmt: skip
        first = engine.answers[0]
        found["engines"][name] = {
            "tokens_per_s": spread(speeds),
            "ours_over_it": spread([a / b for a, b in zip(ours, speeds, strict=True)]),
            "step_s": spread([step["seconds"] for step in counted]),
            "tokens_per_step": statistics.mean(step["tokens"] for step in counted),
            "targets_per_step": statistics.mean(step["targets"] for step in counted),
            "share_of_limit": spread([low / step["seconds"] for low, step in zip(least, counted, strict=True)]),
            "peak_mb": max(step["peak_mb"] for step in engine.answers),
            "imports_mb": first["imports_mb"],
            "first_step_s": first["since_start_s"], "imports_s": first["imports_s"],
            "data": first["data"],
        }  # fmt: skip
        print(f"  {name}: {found['engines'][name]['tokens_per_s']['median']:,.0f} tokens/s", flush=True)
    return found


def compare_preparation(bench: Bench) -> list[dict[str, Any]]:
    """Rows per second of labelling, in turn."""
    smallest = bench.args.smallest
    pairs = read_pairs(bench.args.data, 64 if smallest else bench.args.prepare_rows)
    shape = "smallest" if smallest else "26m"
    found = []
    for workers in (1, bench.args.threads) if bench.args.threads > 1 else (1,):
        task = bench.task(f"prepare-{workers}", shape, "full", 2048, pairs, workers=workers, steps=1)
        names = [name for name in ("prepare-ours", "prepare-trl") if bench.has(name)]
        with contextlib.ExitStack() as stack:
            engines = {name: stack.enter_context(bench.engine(name, task)) for name in names}
            for _ in range(2 if smallest else 4):
                for engine in engines.values():
                    engine.go()
        speeds = {name: [a["rows"] / a["seconds"] for a in one.answers[2:]] for name, one in engines.items()}
        row: dict[str, Any] = {"workers": workers, "rows": len(pairs)}
        for name, values in speeds.items():
            row[name] = spread(values)
            row[f"ours_over_{name}"] = spread([a / b for a, b in zip(speeds["prepare-ours"], values, strict=True)])
        found.append(row)
        print(
            f"  {workers} process(es): " + ", ".join(f"{k} {row[k]['median']:,.0f} rows/s" for k in speeds), flush=True
        )
    return found


def _measure_alone(bench: Bench, name: str, task: Task, rounds: int) -> dict[str, Any]:
    with bench.engine(name, task) as engine:
        for _ in range(1 + rounds):
            engine.go()
    steps = engine.answers[2:]
    return {
        "tokens_per_s": spread([step["tokens"] / step["seconds"] for step in steps]),
        "peak_mb": max(step["peak_mb"] for step in engine.answers),
    }


def measure_lengths(bench: Bench) -> list[dict[str, Any]]:
    """Speed against the length of the documents, each forward full."""
    smallest = bench.args.smallest
    shape, tokens = ("smallest", 512) if smallest else ("26m", 8192)
    found = []
    for length in (64, 128) if smallest else LENGTHS:
        texts = _texts_of_length(bench, shape, length, 8 * tokens // length + 8)
        task = bench.task(f"length-{length}", shape, "full", tokens, texts, max_seq_len=tokens)
        row: dict[str, Any] = {"length": length}
        for name in ("ours", "trl-packed"):
            if bench.has(name):
                row[name] = _measure_alone(bench, name, task, 1 if smallest else 2)
                print(f"  {length} tokens, {name}: {row[name]['tokens_per_s']['median']:,.0f} tokens/s", flush=True)
        found.append(row)
    return found


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


def measure_sizes(bench: Bench) -> list[dict[str, Any]]:
    """Speed against the size of the model."""
    smallest = bench.args.smallest
    found = []
    pairs = read_pairs(bench.args.data)
    for shape in ("smallest",) if smallest else SIZES:
        tokens = 256 if smallest else 2048 if shape != "500m" else 1024
        task = bench.task(f"size-{shape}", shape, "full", tokens, pairs)
        row: dict[str, Any] = {"parameters": bench.parameters(shape)}
        row["ours"] = _measure_alone(bench, "ours", task, 1 if smallest or shape == "500m" else 3)
        print(f"  {row['parameters']:,} parameters: {row['ours']['tokens_per_s']['median']:,.0f} tokens/s", flush=True)
        found.append(row)
    return found


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
        done = subprocess.run([args.peers_python, "-c", code, *PACKAGES], capture_output=True, text=True, check=True)
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


def run_stages(args: argparse.Namespace, found: dict[str, Any], keep: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        bench = Bench(args, Path(name))
        for stage in args.stages:
            began = time.monotonic()
            print(f"{stage}:", flush=True)
            if stage == "steps":
                cases = [
                    case
                    for case in (SMALLEST if args.smallest else CASES)
                    if args.only in f"{case.shape} {case.method}"
                ]
                found.setdefault("steps", {})
                for case in cases:
                    print(f" {case.shape}, {case.method}", flush=True)
                    found["steps"][f"{case.shape} {case.method}"] = compare_steps(bench, case)
                    keep()
            elif stage == "prepare":
                found["prepare"] = compare_preparation(bench)
            elif stage == "lengths":
                found["lengths"] = measure_lengths(bench)
            else:
                found["sizes"] = measure_sizes(bench)
            keep()
            print(f" {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of Alpaca's form; default: generated rows")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: one made of a few words")
    parser.add_argument("--large-tokenizer", type=Path, help="for the shapes of Qwen, which need a tokenizer of Qwen")
    parser.add_argument("--peers-python", type=Path, help="interpreter of an environment with TRL")
    parser.add_argument("--minimind", type=Path, metavar="CHECKOUT", help="a clone of MiniMind")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases of `steps` with TEXT in their name, as `26m lora`"
    )
    parser.add_argument(
        "--engines", nargs="+", metavar="NAME", help="of `steps`: trl-packed, trl-padded, trainer; default: all"
    )
    parser.add_argument("--rounds", type=int, help="rounds of `steps`; default: 4 to 12, more where steps are short")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--prepare-rows", type=int, default=5000, help="rows of the stage prepare; default 5000")
    parser.add_argument("--smallest", action="store_true", help="a tiny model and few rounds, to try the script")
    parser.add_argument("--docs", type=Path, default=Path("."), help="folder for benchmark.json, .md and the plots")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the pages from benchmark.json")
    args = parser.parse_args()
    path = args.docs / "benchmark.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def keep() -> None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_pages(args.docs, found)

    if not args.render:
        found["machine"] = describe_machine(args)
        run_stages(args, found, keep)
    write_pages(args.docs, found)


if __name__ == "__main__":
    main()
