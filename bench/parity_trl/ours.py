"""Train 50 steps with tunesmith and record the rows of each step, for theirs.py to repeat."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from inputs import LR, MAX_SEQ_LEN, MICRO_BATCH_TOKENS, MODES, STEPS, TRAIN_SEED, write_inputs

from tunesmith.cli import main
from tunesmith.data.store import open_store
from tunesmith.plans.plan import ShuffledPlan


def run(folder: Path, mode: str, num_steps: int = STEPS) -> dict[str, Any]:
    """Train on the inputs of `mode`; write and return folder/ours.json: hashes, settings, steps, losses."""
    sha256 = write_inputs(folder, mode)
    template = ["--data.chat_template", "none"] if mode == "none" else []
    code = main([
        "train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--output", str(folder / "run"),
        "--optim.lr", str(LR), "--optim.schedule", "cosine", "--optim.warmup_ratio", "0", "--train.max_steps", str(num_steps),
        "--data.max_seq_len", str(MAX_SEQ_LEN), "--train.micro_batch_tokens", str(MICRO_BATCH_TOKENS),
        "--data.share_prefix", "off",  # with it, a step has more samples than one of TRL's
        "--train.precision", "fp32", "--train.seed", str(TRAIN_SEED), *template,
    ])  # fmt: skip
    assert code == 0
    steps = rows_of_steps(folder / "run", num_steps)
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    sha256["steps"] = hashlib.sha256(json.dumps(steps).encode()).hexdigest()
    settings = {"learning_rate": LR, "max_length": MAX_SEQ_LEN, "seed": TRAIN_SEED}
    ours = {"mode": mode, "sha256": sha256, "settings": settings, "steps": steps, "losses": losses}
    (folder / "ours.json").write_text(json.dumps(ours))
    return ours


def rows_of_steps(run_folder: Path, num_steps: int) -> list[list[int]]:
    """The rows (from 0) of each step, in the order of the packs."""
    store = open_store(run_folder / "tokens")
    plan = ShuffledPlan(np.arange(len(store)), store.lengths, MICRO_BATCH_TOKENS, TRAIN_SEED)
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < num_steps:
        packs = plan.packs(epoch)
        steps += [[int(store.row_numbers[i]) - 1 for i in pack] for pack in packs]
        epoch += 1
    return steps[:num_steps]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("mode", choices=MODES, help="none: prompt + completion + EOS; alpaca: through a chat template")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    options = parser.parse_args()
    run(options.folder, options.mode, options.steps)
