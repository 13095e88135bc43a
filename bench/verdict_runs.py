"""Real small runs that went well or badly, as input for the tests of the verdict: tests/golden/verdicts.json.

    python bench/verdict_runs.py --chats alpaca_en_demo.json --text tinyshakespeare.txt --work DIR

Each run is one `tunesmith train` (a minute or two on one core); runs that DIR has already are only collected. What is
kept of a run is what its verdict reads: config, metrics, and the counts of its ledger. Names of folders are removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tunesmith.cli import main as tunesmith
from tunesmith.data.fit import NOTE_CUT_REPLY
from tunesmith.report.records import read_run
from tunesmith.report.replies import kept_replies

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "src" / "tunesmith" / "demo" / "base"
GOLDEN = ROOT / "tests" / "golden" / "verdicts.json"
CHATS = ["--model", str(BASE), "--data.chat_template", "chatml", "--data.max_seq_len", "256", "--train.micro_batch_tokens",
         "1024", "--data.overlong", "drop"]  # fmt: skip
TEXT = ["--model", "new:tiny", "--tokenizer", str(BASE), "--data.eval_split", "0.02", "--data.max_seq_len", "256",
        "--train.micro_batch_tokens", "1024"]  # fmt: skip
SPLIT = "--data.eval_split 0.1"
# name -> flags after those of CHATS, or of TEXT where the name begins with "text"; "+" begins what a resume gets
RUNS = {
    "good": f"{SPLIT} --optim.lr 1e-3 --train.epochs 2 --train.eval_steps 40",
    "good_lora": f"{SPLIT} --lora.kind lora --optim.lr 3e-3 --train.epochs 2 --train.eval_steps 40",
    "good_text": "--optim.lr 1e-3 --train.max_steps 200 --train.eval_steps 50",
    "good_without_eval": "--optim.lr 1e-3",
    "lr_100_times_too_high": f"{SPLIT} --optim.lr 1e-1 --train.epochs 2 --train.eval_steps 40",
    "lr_100_times_too_low": f"{SPLIT} --optim.lr 1e-5 --train.epochs 2 --train.eval_steps 40",
    "lora_lr_too_low": f"{SPLIT} --lora.kind lora",
    "text_lr_too_high": "--optim.lr 1e-1 --train.max_steps 200 --train.eval_steps 50",
    "ten_epochs_evaluated": "--data.limit 60 --data.eval_split 0.2 --optim.lr 2e-3 --train.epochs 10 --train.eval_steps 10",
    "ten_epochs_evaluated_at_the_end": "--data.limit 60 --data.eval_split 0.2 --optim.lr 2e-3 --train.epochs 10",
    "ten_epochs_without_eval": "--data.limit 50 --optim.lr 2e-3 --train.epochs 10",
    "stopped_early": "--data.limit 100 --data.eval_split 0.2 --optim.lr 2e-3 --train.epochs 20 --train.eval_steps 10 "
    "--train.early_stop_patience 3",
    "resumed": f"{SPLIT} --optim.lr 1e-3 --train.max_steps 40 --train.eval_steps 20 + --train.max_steps 120 --allow schedule",
    "truncated": f"--data.max_seq_len 96 --data.overlong truncate --data.max_refused 0.1 {SPLIT} --optim.lr 1e-3",
    "one_step": "--optim.lr 1e-3 --train.max_steps 1",
    "six_steps": f"{SPLIT} --optim.lr 1e-3 --train.grad_accum_steps 8",
    "thirty_steps_from_scratch": f"--model new:tiny --tokenizer {BASE} --train.max_steps 30",
}


def train(name: str, folder: Path, chats: Path, text: Path) -> None:
    is_text = "text" in name
    first, _, more = RUNS[name].partition(" + ")
    words = [*(TEXT if is_text else CHATS), "--data", str(text if is_text else chats), *first.split()]
    code = tunesmith(["train", *words, "--output", str(folder)])
    if not code and more:
        code = tunesmith(["resume", str(folder), *more.split()])
    if code:
        raise SystemExit(f"{name}: exit code {code}")


def collect(folder: Path) -> dict[str, Any]:
    """What the verdict on a run reads, without names of folders and without clocks."""
    run = read_run(folder)
    config = run.config.model_dump(mode="json", exclude_defaults=True)
    model = config["model"]["path"]
    config["model"] = {"path": model if model.startswith("new:") else "base"}
    config["data"] = {**config["data"], "train": ["data"]}
    config["train"] = {**config["train"], "output_dir": "run"}
    kept = ("step", "epoch", "loss", "lr", "skipped", "eval_loss")
    columns = {name: [_short(record.get(name)) for record in run.records] for name in kept}
    part = run.ledger["train"]
    entries = part["files"].values()
    cut = [row for entry in entries for row in entry["notes"].get(NOTE_CUT_REPLY, [])]
    entry = {
        "rows": sum(entry["rows"] for entry in entries),
        "used": sum(entry["used"] for entry in entries),
        "refused": {},
        "truncated": [item for entry in entries for item in entry["truncated"]],
        "notes": {NOTE_CUT_REPLY: cut} if cut else {},
    }
    replies = [
        {"reply": reply.reply, "has_stopped": reply.has_stopped, "wanted_share": reply.wanted_share}
        for reply in kept_replies(run.folder, run.last_step).replies
    ]
    return {
        "config": config,
        "records": {name: values for name, values in columns.items() if any(v is not None for v in values)},
        "ledger": {"train": {"files": {"data": entry}, "tokens": part["tokens"]}, "eval": None},
        "replies": replies,
    }


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=Path, required=True, help="chats in alpaca's format, some hundred rows")
    parser.add_argument("--text", type=Path, required=True, help="raw text")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument(
        "--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME", help="some of the runs"
    )
    parser.add_argument(
        "--output", type=Path, default=GOLDEN, metavar="FILE", help="default: tests/golden/verdicts.json"
    )
    options = parser.parse_args()
    found = {}
    for name in options.only:
        folder = options.work / name
        if not (folder / "report.html").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            train(name, folder, options.chats, options.text)
        found[name] = {"flags": RUNS[name].replace(str(BASE), "BASE"), **collect(folder)}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in found.items())
    options.output.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(f"{len(found)} runs: {options.output}")


if __name__ == "__main__":
    sys.exit(main())
