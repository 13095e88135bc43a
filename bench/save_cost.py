"""What a checkpoint costs: steps beside a save against steps without, and the share of a run at the default interval.

Usage: save_cost.py TOKENIZER DATA [ROUNDS]

Trains new:minimind-26m on DATA. Each round times steps until a save is done that began with the first of them, then as
many steps without; medians over all rounds.
"""

from __future__ import annotations

import datetime
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.run.start import assemble, build_trainer, choose_setting, make_guard
from tunesmith.train.interrupt import StopRequest
from tunesmith.train.loop import Trainer
from tunesmith.train.plan import PlannedStep, prepare_data

MIN_STEPS = 3


def build(tokenizer: str, data: str, folder: Path) -> Trainer:
    flags = {"model.path": "new:minimind-26m", "model.tokenizer": tokenizer, "data.train": data, "data.max_seq_len": 512,
             "train.micro_batch_tokens": 1024, "train.output_dir": str(folder), "train.max_steps": 10_000}  # fmt: skip
    config = resolve_config(RunConfig, None, flags)
    setting = choose_setting(config, datetime.datetime.now())
    prepared = prepare_data(config.data, setting.encoder, setting.max_seq_len, folder)
    facts = assemble(config, setting, prepared, config.model)
    run = {"id": "bench", "guard": make_guard(config, setting, prepared.sha256, {})}
    return build_trainer(folder, facts, StopRequest(), run)


def timed(trainer: Trainer, planned: PlannedStep) -> float:
    began = time.perf_counter()
    trainer._step(planned)
    return time.perf_counter() - began


def main(tokenizer: str, data: str, rounds: int = 5) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        trainer = build(tokenizer, data, Path(temporary) / "run")
        steps = trainer.plan.steps()
        trainer.lm.train()
        trainer._saved_at = time.monotonic()
        for _ in range(3):
            timed(trainer, next(steps))
        snapshots, beside, without, extra = [], [], [], []
        for _ in range(rounds):
            began = time.perf_counter()
            trainer.save()
            snapshots.append(time.perf_counter() - began)
            during = []
            while trainer.saver._thread and (trainer.saver._thread.is_alive() or len(during) < MIN_STEPS):
                during.append(timed(trainer, next(steps)))
            trainer.saver.wait()
            assert not trainer.saver.failure, trainer.saver.failure
            alone = [timed(trainer, next(steps)) for _ in during]
            beside += during
            without += alone
            extra.append(snapshots[-1] + sum(during) - sum(alone))
        step, slow = statistics.median(without), statistics.median(beside)
        cost, interval = statistics.median(extra), min(600.0, 500 * step)
        print(
            f"{os.cpu_count()} CPU cores: a step takes {step:.2f} s without a save and {slow:.2f} s beside one (x "
            f"{slow / step:.2f}); the snapshot stops training for {statistics.median(snapshots):.2f} s; a save costs "
            f"{cost:.1f} s in all, {cost / interval:.1%} of the {interval:.0f} s between two by default"
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 5)
