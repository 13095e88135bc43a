"""Recreate the demo's base model and tokenizer: pre-training on public-domain books and generated drills.

BOOKS contains classic-books/*.md (English) and chinese-classics/*.txt; their SHA-256 must be those in base_books.json,
so that the origin of shipped weights is known. WORK is a new folder for the drills, the tokenizer and the run. Takes
about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.cli import main as tunesmith
from tunesmith.demo.drills import Drill, draw_drills, words_of_books
from tunesmith.demo.tasks import HeldOut, draw_held_out_tasks
from tunesmith.model.bpe import train_tokenizer
from tunesmith.older_keys import add_older_keys

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "src" / "tunesmith" / "demo" / "base"
VOCAB_SIZE = 4096
NUM_DRILLS, TOKENIZER_DRILLS = 400_000, 60_000
CONFIG = {  # 2.8M parameters in Qwen3's shape
    "hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32,
    "intermediate_size": 512, "max_position_embeddings": 1024,
}  # fmt: skip
TRAIN = {
    "data.chat_template": "none", "data.max_seq_len": 512, "optim.lr": 2e-3, "optim.min_lr_ratio": 0.05,
    "train.micro_batch_tokens": 1024, "train.log_steps": 100, "train.save_steps": 1000, "train.seed": 1,
    "train.precision": "fp32", "data.share_prefix": False,  # the same on every machine
}  # fmt: skip
STEPS = 7_000


def find_books(folder: Path, hashes: Path) -> list[Path]:
    books = sorted([*folder.glob("classic-books/*.md"), *folder.glob("chinese-classics/*.txt")])
    expected = json.loads(hashes.read_text(encoding="utf-8"))
    found = {book.name: hashlib.sha256(book.read_bytes()).hexdigest() for book in books}
    if found != expected:
        different = sorted({name for name, _ in set(found.items()) ^ set(expected.items())})
        raise SystemExit(f"the books differ from {hashes.name}: {', '.join(different)}")
    return books


def write_rows(path: Path, rows: Iterable[Drill]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_base(options: argparse.Namespace) -> None:
    books, work = find_books(options.books, options.hashes), options.work
    work.mkdir(parents=True)
    texts = [book.read_text(encoding="utf-8") for book in books]
    words = words_of_books(texts)
    drills = work / "drills.jsonl"
    held_out = HeldOut.of([task for tasks in draw_held_out_tasks().values() for task in tasks])
    write_rows(drills, draw_drills(options.drills, 2, words, held_out))
    lines = drills.read_text(encoding="utf-8").splitlines()[:TOKENIZER_DRILLS]
    spoken = ("\n".join(json.loads(line).values()) for line in lines)
    train_tokenizer([*texts, *spoken], options.vocab_size).save_pretrained(work / "tokenizer")
    settings = {
        **TRAIN,
        **{f"model.config.{key}": value for key, value in CONFIG.items()},
        "train.max_steps": options.steps,
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    data = [str(path) for path in (*books, drills)]
    command = ["train", "--model", "new:tiny", "--tokenizer", str(work / "tokenizer"), "--data", *data]
    code = tunesmith([*command, "--output", str(work / "run"), *flags])
    if code:
        raise SystemExit(code)
    keep_base(work / "run" / "model", work / "tokenizer", options.output)


def keep_base(model_folder: Path, tokenizer_folder: Path, output: Path) -> None:
    """Save the weights in bf16: half the package size, and the demo trains them further anyway."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output)
    add_older_keys(output, type(model.config))
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(output)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}: {size / 1e6:.2f} MB")
    assert size <= 8e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--output", type=Path, default=BASE, help="folder of the finished base (default: replace the demo's)"
    )
    parser.add_argument(
        "--hashes", type=Path, default=HERE / "base_books.json", help="JSON file with SHA-256 of the books"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--drills", type=int, default=NUM_DRILLS)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    options = parser.parse_args()
    if options.output != BASE and options.output.exists():
        parser.error(f"{options.output} exists; give --output a new folder")
    make_base(options)
