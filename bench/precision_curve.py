"""Train the same model in fp32 and in bf16 on this CPU, and compare losses and speed.

    python bench/precision_curve.py --data alpaca.json --tokenizer TOKENIZER [--steps 200] [--lora]

For train.precision auto: it may pick bf16 only where that is faster and the loss stays within 1 % of fp32's. Compared
is the mean of each 10 steps, since single steps differ by the rows in them alone. --data is as in compare.py.
Exit code 1 if the losses differ by more than 1 %.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

from compare_inputs import SHAPES, read_pairs, write_model, write_rows

LIMIT, WINDOW = 0.01, 10


def train(folder: Path, precision: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    from tunesmith.config.schema import RunConfig
    from tunesmith.run.console import Silent
    from tunesmith.run.start import run_training

    sections: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(folder / "rows.jsonl")], "max_seq_len": min(512, args.tokens)},
        "optim": {"lr": args.lr},
        "train": {"output_dir": str(folder / precision), "max_steps": args.steps, "precision": precision,
                  "micro_batch_tokens": args.tokens, "save_minutes": None},
    }  # fmt: skip
    if args.lora:
        sections["lora"] = {"kind": "lora", "rank": 16}
    run_training(RunConfig(**sections), Silent())
    lines = (folder / precision / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def windows(records: list[dict[str, Any]]) -> list[float]:
    losses = [record["loss"] for record in records]
    return [statistics.mean(losses[at : at + WINDOW]) for at in range(0, len(losses), WINDOW)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--shape", default="26m", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args()
    from tunesmith.training.precision import has_fast_bf16

    with tempfile.TemporaryDirectory(prefix="precision-") as name:
        folder = Path(name)
        write_model(folder / "model", args.shape, args.tokenizer)
        write_rows(folder / "rows.jsonl", read_pairs(args.data))
        found = {precision: train(folder, precision, args) for precision in ("fp32", "bf16")}
    curves = {precision: windows(records) for precision, records in found.items()}
    differences = [abs(b / a - 1) for a, b in zip(*curves.values(), strict=True)]
    speeds = {p: statistics.median(record["tokens_per_s"] for record in records) for p, records in found.items()}
    print(f"machine: {platform.machine()}, bf16 in hardware: {'yes' if has_fast_bf16() else 'no'}")
    print("| steps | fp32 | bf16 | difference |\n|---|---|---|---|")
    for at, (a, b, difference) in enumerate(zip(*curves.values(), differences, strict=True)):
        first = at * WINDOW + 1
        print(f"| {first}-{min(first + WINDOW - 1, args.steps)} | {a:.4f} | {b:.4f} | {difference:.2%} |")
    print(
        f"\nlargest difference {max(differences):.2%}; bf16 has {speeds['bf16'] / speeds['fp32']:.2f} times fp32's tokens/s"
    )
    return int(max(differences) > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
