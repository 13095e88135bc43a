"""Make the demo's base model and tokenizer again: pre-training on public-domain books and our own statements.

Usage: make_base.py BOOKS WORK [--max-steps N]

BOOKS holds classic-books/*.md (English) and chinese-classics/*.txt; their SHA-256 must be those in base_books.json, so
that nobody ships weights of unknown origin. WORK is a new folder for the prepared text, the tokenizer and the run; the
finished base goes to src/tunesmith/demo/base/.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.cli import main as tunesmith
from tunesmith.demo.tasks import draw_held_out, draw_statements
from tunesmith.files import sha256_file
from tunesmith.model.tokenizer import train_tokenizer

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "src" / "tunesmith" / "demo" / "base"
VOCAB_SIZE = 4096
NUM_DOCUMENTS = 50_000  # of statements; about as many tokens as the books of one language
STATEMENTS_SEED = 7
HELD_OUT_EACH = 40
CONFIG = {  # 3.6M parameters in Qwen3's shape
    "hidden_size": 192, "num_hidden_layers": 7, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32,
    "intermediate_size": 512, "max_position_embeddings": 1024,
}  # fmt: skip
TRAIN = {
    "data.max_seq_len": 512, "data.eval_split": 0.005, "optim.lr": 3e-3, "optim.warmup_ratio": 0.02,
    "optim.min_lr_ratio": 0.05, "optim.weight_decay": 0.05, "train.micro_batch_tokens": 4096, "train.log_steps": 10,
    "train.eval_steps": 500, "train.seed": 1,
}  # fmt: skip


def find_books(folder: Path) -> list[Path]:
    books = sorted([*folder.glob("classic-books/*.md"), *folder.glob("chinese-classics/*.txt")])
    expected = json.loads((HERE / "base_books.json").read_text(encoding="utf-8"))
    found = {book.name: sha256_file(book) for book in books}
    if found != expected:
        different = sorted(set(found.items()) ^ set(expected.items()))
        raise SystemExit(f"the books are not those of base_books.json: {', '.join(name for name, _ in different)}")
    return books


def write_statements(path: Path) -> list[str]:
    """The generated documents; none of the demo's held-out questions stands in them."""
    documents = draw_statements(NUM_DOCUMENTS, STATEMENTS_SEED)
    everything = "\n".join(documents)
    for task in draw_held_out(HELD_OUT_EACH):
        if task.question in everything:
            raise SystemExit(f"a held-out question stands in the pre-training text: {task.question}")
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    return documents


def make_base(books_folder: Path, work: Path, max_steps: int | None) -> None:
    books = find_books(books_folder)
    work.mkdir(parents=True)
    documents = write_statements(work / "statements.jsonl")
    texts = [book.read_text(encoding="utf-8") for book in books]
    train_tokenizer([*texts, *documents], VOCAB_SIZE).save_pretrained(work / "tokenizer")
    flags = [word for key, value in TRAIN.items() for word in (f"--{key}", str(value))]
    flags += [word for key, value in CONFIG.items() for word in (f"--model.config.{key}", str(value))]
    flags += ["--train.max_steps", str(max_steps)] if max_steps else []
    data = [str(path) for path in [*books, work / "statements.jsonl"]]
    command = ["train", "--model", "new:tiny", "--tokenizer", str(work / "tokenizer"), "--data", *data]
    code = tunesmith([*command, "--output", str(work / "run"), *flags])
    if code:
        raise SystemExit(code)
    keep_base(work / "run" / "model")


def keep_base(model_folder: Path) -> None:
    """bf16 weights: half the bytes of the package, and the demo trains them further anyway."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    shutil.rmtree(BASE, ignore_errors=True)
    model.save_pretrained(BASE)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(BASE)
    size = sum(path.stat().st_size for path in BASE.iterdir())
    print(f"{BASE}: {size / 1e6:.2f} MB")
    assert size <= 8e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("books", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--max-steps", type=int)
    options = parser.parse_args()
    make_base(options.books, options.work, options.max_steps)
