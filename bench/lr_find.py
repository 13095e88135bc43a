"""Compares `tunesmith lr-find` and an lr range test with the grids of learning rates of choosing.py.

Run choosing.py first, with the same DATA, WORK and models: its results are the grids. Each search is a line of
WORK/searches.jsonl; one that is there is not made again. A run at each rate that lr-find suggests shows what it costs.

    python bench/choosing.py DATA WORK --only lr
    python bench/lr_find.py DATA WORK --write docs/choosing.md
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from choosing import (
    FILES,
    TOKENS,
    Results,
    Setting,
    flags_of,
    keep_in,
    keep_results,
    lr_grid,
    table,
    write_chats,
    write_page,
)
from kept import Kept

from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import DEFAULT_LORA_LR, LrFindConfig, OptimSection
from tunesmith.demo.run import base_folder
from tunesmith.lr_find import find_lr, for_search, format_lr, prepare
from tunesmith.run.assemble import ReadyRun
from tunesmith.runfolder import RunFolder
from tunesmith.training.optim import build_optimizer, set_lr
from tunesmith.training.step import NotFiniteError, train_step

DEFAULT_LR = OptimSection().lr


@dataclass(frozen=True, slots=True)
class Search:
    """What lr-find and a range test suggest for a setting, and what they cost.

    Attributes:
        steps: of all trials together; `run_steps` those of the run.
        steepest, tenth: of the range test: where its loss falls fastest, and a tenth of where it is lowest.
    """

    lr: float
    steps: int
    run_steps: int
    seconds: float
    steepest: float
    tenth: float


def search(setting: Setting, work: Path, demo: Path) -> Search:
    config = resolve_config(LrFindConfig, None, flags_of(setting, work, demo))
    started = time.perf_counter()
    found = find_lr(config)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        curve = range_test(prepare(for_search(config, folder), folder, {}))
    smooth = smoothed([loss for _, loss in curve])
    falls = [after - before for before, after in itertools.pairwise(smooth)]
    steepest, lowest = curve[falls.index(min(falls))][0], curve[smooth.index(min(smooth))][0]
    return Search(found.lr, len(found.trials) * found.num_steps, found.run_steps, seconds, steepest, lowest / 10)


def range_test(
    ready: ReadyRun, num_steps: int = 60, first: float = 1e-6, last: float = 1.0
) -> list[tuple[float, float]]:
    """Learning rates that rise from step to step, each with the training loss of its step (Smith 2015)."""
    session, lm = ready.session, ready.lm
    optimizer = build_optimizer(lm.model, session.config.optim, session.config.lora.lr_ratio)
    scaler = session.precision.scaler(session.device)
    curve: list[tuple[float, float]] = []
    for number, step in zip(range(num_steps), ready.feed.steps(), strict=False):
        lr = first * (last / first) ** (number / (num_steps - 1))
        set_lr(optimizer, lr)
        try:
            result = train_step(
                lm, optimizer, step.batches, session.config.optim.max_grad_norm, session.precision, scaler
            )
        except NotFiniteError:
            break
        curve.append((lr, result.loss))
    return curve


def smoothed(losses: Sequence[float], share: float = 0.8) -> list[float]:
    """An exponential average without the bias of its first values."""
    average, smooth = 0.0, []
    for count, loss in enumerate(losses, 1):
        average = share * average + (1 - share) * loss
        smooth.append(average / (1 - share**count))
    return smooth


Searches = Kept[Setting, Search]


def search_grid(models: Sequence[str]) -> list[Setting]:
    """Each begins at the default of optim.lr."""
    return [
        Setting(data, kind, lr, model=model)
        for model in models
        for kind, lr in (("none", DEFAULT_LR), ("lora", DEFAULT_LORA_LR))
        for data in FILES
    ]


def checked_runs(searches: Searches, settings: Iterable[Setting]) -> list[Setting]:
    """Runs at the suggested rates."""
    return [replace(setting, lr=searches[setting].lr) for setting in settings if setting in searches]


def grid_loss(points: Sequence[tuple[float, float]], lr: float) -> float:
    """eval_loss at a rate, linear between two points of the grid over log lr; the last point's outside of it."""
    points = sorted(points)
    for (low, low_loss), (high, high_loss) in itertools.pairwise(points):
        if low <= lr <= high:
            return low_loss + (high_loss - low_loss) * math.log(lr / low) / math.log(high / low)
    return points[0][1] if lr < points[0][0] else points[-1][1]


def search_table(results: Results, searches: Searches, grid: Sequence[Setting], searched: Sequence[Setting]) -> str:
    """What the suggested rates cost, against the best of the grid."""
    rows = []
    for setting in searched:
        points = [(one.lr, results[one].eval_loss) for one in grid if replace(one, lr=setting.lr) == setting]
        best_lr, best = min(points, key=lambda point: point[1])
        found = searches[setting]
        own = results[replace(setting, lr=found.lr)].eval_loss
        cells = [f"{format_lr(best_lr)}: {best:.3f}", f"{format_lr(found.lr)}: {own:.3f} ({own / best - 1:+.1%})"]
        for lr in (found.steepest, found.tenth):
            cells.append(f"{format_lr(lr)}: {grid_loss(points, lr) / best - 1:+.1%}")
        what = "full" if setting.kind == "none" else "LoRA"
        rows.append([f"{Path(setting.model).name}, {setting.data}, {what}", *cells, f"{found.steps}"])
    head = ["", "best of the grid", "lr-find", "range test, steepest", "range test, lowest / 10", "steps of lr-find"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with llamafactory/alpaca_en_demo.json and gsm8k/train.jsonl")
    parser.add_argument("work", type=Path, help="folder of choosing.py's results")
    parser.add_argument("--runs", type=int, default=1000, metavar="N", help="make at most so many searches")
    parser.add_argument("--model", action="append", default=[], help="folder of a further model")
    parser.add_argument("--base", type=Path, default=base_folder(), help="in place of the packaged base")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"of a run (default: {TOKENS})")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page, if it is complete")
    options = parser.parse_args()
    models = ["demo", *options.model]
    write_chats(options.work, options.data)
    results = keep_results(options.work, options.base)
    searches = keep_in(options.work / "searches.jsonl", Search, search, options.work, options.base)
    searched = [replace(setting, tokens=options.tokens) for setting in search_grid(models)]
    grid = [replace(setting, tokens=options.tokens) for setting in lr_grid(models)]
    searches.make(searched, options.runs)
    results.make(checked_runs(searches, searched), options.runs)
    if all(run in results for run in [*grid, *checked_runs(searches, searched)]):
        content = search_table(results, searches, grid, searched)
        print(content)
        if options.write:
            write_page(options.write, {"search": content})


if __name__ == "__main__":
    main()
