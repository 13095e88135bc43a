"""Runs grids of small fine-tunes and writes the tables of docs/choosing.md from what they measured.

The model is the packaged base of `tunesmith demo` (2.8M parameters), the data real chats: alpaca_en_demo.json and the
questions of GSM8K. Every run is judged by eval_loss on the same 48 chats of its data set, which are never trained on.
Each result is a line of WORK/results.jsonl. A run that is there is not made again as long as the chats, the base and
the torch version are the same, so the script can be stopped at any time, and the tables can be made one after another.

    python bench/choosing.py DATA WORK                       # all runs: about 40 minutes on one core
    python bench/choosing.py DATA WORK --only lr             # the runs of one table
    python bench/choosing.py DATA WORK --only none --write docs/choosing.md
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from kept import Kept, hash_files

from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.demo.run import base_folder
from tunesmith.run.console import Silent
from tunesmith.run.start import run_training
from tunesmith.runfolder import RunFolder, read_metrics

HELD_OUT = 48  # chats of each data set that are evaluated on
FORWARD = 1024  # tokens of one forward, at most
TOKENS = 40 * 1024  # of a run, where nothing else is said
FILES = {"alpaca": "llamafactory/alpaca_en_demo.json", "gsm8k": "gsm8k/train.jsonl"}
LRS = {"none": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
BEST = {"none": 3e-3, "lora": 1e-2}  # of the grid below; the other tables are made with it


@dataclass(frozen=True, slots=True)
class Setting:
    """One run.

    Attributes:
        model: demo, or a folder.
        tokens: trained on in all, where `epochs` is not given.
        rows: chats trained on; None: all that there are.
    """

    data: str = "alpaca"
    kind: str = "none"
    lr: float = BEST["none"]
    step_tokens: int = FORWARD
    tokens: int = TOKENS
    epochs: float | None = None
    rows: int | None = None
    rank: int = 16
    alpha: float | None = None
    seed: int = 0
    model: str = "demo"


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gave: eval_loss before and after it, and its last loss, averaged over an eighth of the steps."""

    before: float
    eval_loss: float
    loss: float
    steps: int
    seconds: float


Made = TypeVar("Made")
Results = Kept[Setting, Result]


# ---- the runs -------------------------------------------------------------------------------------------------------


def write_chats(folder: Path, data: Path) -> None:
    """NAME-held.jsonl and NAME-train.jsonl: shuffled once, the same for all runs."""
    for name, file in FILES.items():
        text = (data / file).read_text(encoding="utf-8")
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        if name == "gsm8k":
            rows = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
        random.Random(0).shuffle(rows)
        held = min(HELD_OUT, len(rows) // 3)
        for part, chosen in (("held", rows[:held]), ("train", rows[held : held + 760])):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
            (folder / f"{name}-{part}.jsonl").write_text(lines, encoding="utf-8")


def flags_of(setting: Setting, work: Path, demo: Path) -> dict[str, Any]:
    forward = min(FORWARD, setting.step_tokens)
    flags = {
        "model.path": str(demo) if setting.model == "demo" else setting.model,
        "data.train": [str(work / f"{setting.data}-train.jsonl")],
        "data.eval": [str(work / f"{setting.data}-held.jsonl")],
        "data.chat_template": "chatml" if setting.model == "demo" else None,
        "data.max_seq_len": 512,
        "data.limit": setting.rows,
        "optim.lr": setting.lr,
        "train.micro_batch_tokens": forward,
        "train.grad_accum_steps": setting.step_tokens // forward,
        "train.precision": "fp32",
        "train.seed": setting.seed,
        "train.keep_checkpoints": 1,
    }
    if setting.kind == "none":
        flags |= {"lora.kind": "none"}
    else:
        flags |= {"lora.kind": setting.kind, "lora.rank": setting.rank, "lora.alpha": setting.alpha}
    if setting.epochs is None:
        flags["train.max_steps"] = max(1, setting.tokens // setting.step_tokens)
    else:
        flags["train.epochs"] = setting.epochs
    return flags


def run(setting: Setting, work: Path, demo: Path) -> Result:
    """Train as `tunesmith train` does, without the report."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        flags = flags_of(setting, work, demo) | {"train.output_dir": name}
        run_training(resolve_config(RunConfig, None, flags), Silent())
        records = read_metrics(RunFolder(Path(name)).metrics)
    evals = [record["eval_loss"] for record in records if "eval_loss" in record]
    losses = [record["loss"] for record in records if "loss" in record]
    last = statistics.mean(losses[-max(1, len(losses) // 8) :])
    return Result(evals[0], evals[-1], last, records[-1]["step"], time.perf_counter() - started)


def keep_in(
    file: Path, result_of: Callable[..., Made], make: Callable[[Setting, Path, Path], Made], work: Path, demo: Path
) -> Kept[Setting, Made]:
    """What `make` makes of a setting, kept in a file as long as chats, weights and the torch version are the same."""
    chats = [work / f"{name}-{part}.jsonl" for name in FILES for part in ("held", "train")]

    @cache
    def made_from(model: str) -> str:
        folder = demo if model == "demo" else Path(model)
        return hash_files([*chats, *sorted(path for path in folder.iterdir() if path.is_file())], torch.__version__)

    return Kept(
        file, Setting, result_of, lambda setting: make(setting, work, demo), lambda setting: made_from(setting.model)
    )


def keep_results(work: Path, demo: Path) -> Results:
    """WORK/results.jsonl. The chats must be in WORK already."""
    return keep_in(work / "results.jsonl", Result, run, work, demo)


# ---- the grids ------------------------------------------------------------------------------------------------------


def lr_grid(models: Sequence[str]) -> list[Setting]:
    """Alpaca with the demo's base has two seeds, which show how much of a difference is chance."""
    settings = []
    for model in models:
        for data in FILES:
            for kind, lrs in LRS.items():
                is_first = data == "alpaca" and model == "demo"
                settings += [
                    Setting(data, kind, lr, seed=seed, model=model)
                    for lr in lrs
                    for seed in ((0, 1) if is_first and kind == "none" and lr in lrs[1:4] else (0,))
                ]
    return settings


def batch_grid() -> list[Setting]:
    return [Setting(step_tokens=tokens, lr=lr) for tokens in (512, 1024, 4096) for lr in (3e-4, 1e-3, 3e-3, 1e-2)]


def epoch_grid() -> list[Setting]:
    return [Setting(rows=24, epochs=epochs) for epochs in (1, 2, 4, 8, 16)]


def rank_grid() -> list[Setting]:
    lora = Setting(kind="lora", lr=BEST["lora"])
    settings = [replace(lora, rank=rank) for rank in (1, 4, 16, 64)]
    return [*settings, replace(lora, rank=64, alpha=32), replace(lora, rank=16, alpha=128)]


def amount_grid() -> list[Setting]:
    """One epoch over each number of chats, and a fixed number of steps over each."""
    return [Setting(rows=rows, epochs=epochs) for rows in (19, 38, 76, 152, 304) for epochs in (1, None)]


# ---- the tables -----------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def format_lr(lr: float) -> str:
    """2.0e-05 as 2e-5."""
    digits, exponent = f"{lr:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def losses(results: Results, settings: Sequence[Setting]) -> str:
    """eval_loss of one setting, by seed; empty where it was not run."""
    return " / ".join(f"{results[setting].eval_loss:.3f}" for setting in settings)


def marked(cells: list[str], values: Sequence[float]) -> list[str]:
    """The cell with the lowest value in bold."""
    best = values.index(min(values))
    return [f"**{cell}**" if at == best else cell for at, cell in enumerate(cells)]


def lr_table(results: Results, grid: Sequence[Setting]) -> str:
    parts = []
    for kind, lrs in LRS.items():
        what = "full fine-tuning" if kind == "none" else f"LoRA, rank {Setting().rank}"
        rows = []
        for model, data in dict.fromkeys((setting.model, setting.data) for setting in grid):
            own = [setting for setting in grid if (setting.model, setting.data, setting.kind) == (model, data, kind)]
            points = [[setting for setting in own if setting.lr == lr] for lr in lrs]
            means = [statistics.mean([results[one].eval_loss for one in point] or [math.inf]) for point in points]
            cells = marked([losses(results, point) for point in points], means)
            rows.append([f"{Path(model).name}, {data}", f"{results[own[0]].before:.3f}", *cells])
        parts.append(table([f"{what}: `optim.lr`", "before", *map(format_lr, lrs)], rows))
    return "\n".join(parts)


def batch_table(results: Results, grid: Sequence[Setting]) -> str:
    lrs = sorted({setting.lr for setting in grid})
    rows = []
    for tokens in sorted({setting.step_tokens for setting in grid}):
        own = {setting.lr: results[setting] for setting in grid if setting.step_tokens == tokens}
        values = [own[lr].eval_loss if lr in own else math.inf for lr in lrs]
        cells = marked([f"{value:.3f}" if value < math.inf else "" for value in values], values)
        rows.append([f"{tokens:,}", str(next(iter(own.values())).steps), *cells])
    return table(["tokens a step", "steps", *(f"lr {format_lr(lr)}" for lr in lrs)], rows)


def epoch_table(results: Results, grid: Sequence[Setting]) -> str:
    rows = [
        [f"{s.epochs:g}", str(results[s].steps), f"{results[s].loss:.3f}", f"{results[s].eval_loss:.3f}"] for s in grid
    ]
    return table(["`train.epochs`", "steps", "`loss` at the end", "`eval_loss`"], rows)


def rank_table(results: Results, grid: Sequence[Setting]) -> str:
    rows = []
    for setting in grid:
        alpha = setting.alpha or 2 * setting.rank
        rows.append([str(setting.rank), f"{alpha:g}", f"{alpha / setting.rank:g}", losses(results, [setting])])
    return table(["`lora.rank`", "`lora.alpha`", "alpha / rank", "`eval_loss`"], rows)


def amount_table(results: Results, grid: Sequence[Setting]) -> str:
    """One epoch, then as many as a run of the usual length has."""
    rows = []
    for chats in dict.fromkeys(setting.rows for setting in grid):
        cells = []
        for is_one in (True, False):
            own = [setting for setting in grid if setting.rows == chats and (setting.epochs == 1) == is_one]
            cells += [str(results[own[0]].steps), losses(results, own)] if own else ["", ""]
        rows.append([str(chats), *cells])
    return table(["chats", "steps of one epoch", "`eval_loss`", "steps of a fixed number", "`eval_loss`"], rows)


def write_page(page: Path, tables: dict[str, str]) -> None:
    """Put each table between its two marks, where the page has them."""
    text = page.read_text(encoding="utf-8")
    for name, content in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{page}: has no {begin.strip()} ... {end}")
        text = f"{before}{begin}\n{content}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with llamafactory/alpaca_en_demo.json and gsm8k/train.jsonl")
    parser.add_argument("work", type=Path, help="folder for the results")
    names = ("lr", "batch", "epochs", "rank", "amount")
    parser.add_argument(
        "--only", nargs="+", choices=(*names, "none"), default=list(names), help="tables to make runs for"
    )
    parser.add_argument("--runs", type=int, default=1000, metavar="N", help="make at most so many runs")
    parser.add_argument("--model", action="append", default=[], help="folder of a further model for the lr table")
    parser.add_argument("--base", type=Path, default=base_folder(), help="in place of the packaged base")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"of a run (default: {TOKENS})")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables that are complete into this page")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    write_chats(options.work, options.data)
    models = ["demo", *options.model]

    def sized(settings: Iterable[Setting]) -> list[Setting]:
        return [replace(setting, tokens=options.tokens) for setting in settings]

    results = keep_results(options.work, options.base)
    grids = {
        "lr": sized(lr_grid(models)),
        "batch": sized(batch_grid()),
        "epochs": sized(epoch_grid()),
        "rank": sized(rank_grid()),
        "amount": sized(amount_grid()),
    }
    shows = {"lr": lr_table, "batch": batch_table, "epochs": epoch_table, "rank": rank_table, "amount": amount_table}
    for name in options.only:
        if name != "none":
            results.make(grids[name], options.runs)
    complete = {name: shows[name](results, grid) for name, grid in grids.items() if all(s in results for s in grid)}
    for name, content in complete.items():
        print(f"\n{name}\n{content}")
    if options.write:
        write_page(options.write, complete)


if __name__ == "__main__":
    main()
