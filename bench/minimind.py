"""Runs tunesmith beside a checkout of MiniMind and compares: its classes, its scripts, its training.

CHECKOUT is a clone of https://github.com/jingyaogong/minimind at any commit since 2024. It is copied to a work folder
and stays as it is; every run is on the CPU. Three parts, each printed as a table:

- classes: models of MiniMind's own class with random weights, saved as its scripts save them and in fp32, opened here,
  exported, and opened by its class again; log-probabilities compared. Its LoRA files the same.
- use: a model trained here answers in MiniMind's chat script and in its API server (which needs fastapi and uvicorn),
  with the same words as in `tunesmith chat`.
- train: one epoch of SFT from the same weights on the same rows, by its train_full_sft.py and by `tunesmith train`; then
  the loss of both on rows that neither has seen, computed by MiniMind's class.

    python bench/minimind.py minimind --part classes
    python bench/minimind.py minimind --text books/ --chats chats.jsonl
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from minimind_checkout import Checkout, build, copy_checkout, draw_weights, log_probs, make_work, width_of
from minimind_runs import Plan, compare_training, compare_use

from tunesmith.config.schema import ModelSection
from tunesmith.exports.request import Export
from tunesmith.exports.run import run_export
from tunesmith.model.load import load_config, load_model
from tunesmith.model.tokenizer import load_tokenizer

SIZES: dict[str, tuple[int | None, int | None]] = {"small": (128, 3), "default": (None, None)}
LORA_RANK = 4


def open_here(checkout: Checkout, file: Path) -> Any:
    """A .pth as `tunesmith train --model FILE` opens it."""
    section = ModelSection(path=str(file), tokenizer=str(checkout.tokenizer))
    return load_model(section, load_config(section, load_tokenizer(section)), torch.float32, seed=0).eval()


def export(checkout: Checkout, source: Path, output: Path, kind: str, base: Path | None = None) -> Path:
    generation = checkout.generation if kind != "hf" else None
    where = {"base": str(base)} if base else {}
    run_export(Export(str(source), str(output), kind, generation, tokenizer=str(checkout.tokenizer), **where))
    return next(output.glob("*.pth")) if kind != "hf" else output


@torch.no_grad()
def round_weights(model: Any) -> None:
    """To what a file in half precision holds; `model.half()` would round its rotary embeddings as well."""
    for weight in model.parameters():
        weight.copy_(weight.half())


def difference(one: torch.Tensor, other: torch.Tensor) -> str:
    return f"{(one - other).abs().max().item():.1e}"


def compare_model(checkout: Checkout, work: Path, size: str, is_moe: bool) -> Iterator[list[str]]:
    """Rows of the table for one architecture."""
    model = build(checkout, *SIZES[size], is_moe)
    draw_weights(model, seed=len(size) + is_moe)
    ids = torch.randint(0, 6400, (96,), generator=torch.Generator().manual_seed(1))
    count = sum(weight.numel() for weight in model.parameters()) / 1e6
    name = f"{'MoE' if is_moe else 'dense'}, {size} ({width_of(model)} wide, {count:.1f}M)"
    for precision in ("fp32", "half"):
        folder = work / f"{size}-{is_moe}-{precision}"
        folder.mkdir()
        file = folder / f"full_sft_{width_of(model)}{'_moe' if is_moe else ''}.pth"
        if precision == "half":
            round_weights(model)
        torch.save(
            {key: value.half() if precision == "half" else value for key, value in model.state_dict().items()}, file
        )
        wanted = log_probs(checkout, model, ids)
        found = log_probs(None, open_here(checkout, file), ids)
        back = export(checkout, file, folder / "back", "minimind")
        tensors = torch.load(back, weights_only=True)
        theirs = build(checkout, *SIZES[size], is_moe)
        theirs.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=True)
        round_weights(model)
        again = difference(log_probs(checkout, model, ids), log_probs(checkout, theirs, ids))
        written = {key: value.half() for key, value in model.state_dict().items()}
        same = all(torch.equal(value, tensors[key]) for key, value in written.items() if key in tensors)
        row = [name, precision, difference(wanted, found), again, "yes" if same else "NO"]
        has_lora = size == "small" and precision == "half"
        yield row + (compare_lora(checkout, model, file, folder, ids) if has_lora else ["", ""])


def compare_lora(checkout: Checkout, model: Any, base: Path, folder: Path, ids: torch.Tensor) -> list[str]:
    """Largest differences of a LoRA file of theirs opened here, and of ours opened there."""
    if not (checkout.folder / "model" / "model_lora.py").is_file():
        return ["none there", "none there"]
    lora = importlib.import_module("model.model_lora")
    hidden, layers = SIZES["small"]
    trained = build(checkout, hidden, layers, is_moe=base.stem.endswith("_moe"))
    trained.load_state_dict(model.state_dict())
    lora.apply_lora(trained, rank=LORA_RANK)
    matrices = [weight for key, weight in trained.named_parameters() if ".lora." in key]
    torch.manual_seed(5)
    for weight in matrices:
        weight.data = (torch.randn_like(weight) * 0.1).half().float()
    wanted = log_probs(checkout, trained, ids)
    theirs = folder / "lora_theirs.pth"
    lora.save_lora(trained, str(theirs))
    adapter = export(checkout, theirs, folder / "adapter", "hf", base)
    found = log_probs(None, open_adapted(checkout, base, adapter), ids)
    ours = export(checkout, adapter, folder / "lora", "minimind-lora")
    for weight in matrices:
        weight.data.zero_()
    lora.load_lora(trained, str(ours))
    return [difference(wanted, found), difference(wanted, log_probs(checkout, trained, ids))]


def open_adapted(checkout: Checkout, base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(open_here(checkout, base), str(adapter)).eval()


def compare_classes(checkout: Checkout, work: Path, sizes: list[str]) -> list[list[str]]:
    heads = ["model", "file", "opened here", "exported, opened there", "same tensors", "LoRA in", "LoRA out"]
    rows = [heads]
    for size in sizes:
        for is_moe in (False, True):
            rows += compare_model(checkout, work, size, is_moe)
    return rows


def show(title: str, rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |", flush=True)
        if number == 0:
            print(f"|{' --- |' * len(row)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of MiniMind")
    parser.add_argument("--part", nargs="+", choices=["classes", "use", "train"], default=["classes", "use", "train"])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="of the part classes")
    parser.add_argument("--moe", action="store_true", help="use and train: a mixture of experts")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="use and train: texts for a short pre-training")
    parser.add_argument("--chats", nargs="+", metavar="FILE", help="use and train: chats, in any format of tunesmith")
    parser.add_argument("--limit", type=int, default=2000, help="rows of the chats (default 2000)")
    parser.add_argument("--steps", type=int, default=400, help="steps of pre-training (default 400)")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate of both SFT runs (default 5e-4)")
    parser.add_argument("--settings", default="", help="further flags of `tunesmith train` in the SFT run")
    parser.add_argument("--above", nargs="*", type=Path, default=[], metavar="FOLDER",
                        help="folders for PYTHONPATH of MiniMind's scripts, with packages that they need")  # fmt: skip
    parser.add_argument("--work", metavar="FOLDER", help="keeps the runs (default: a temporary folder)")
    options = parser.parse_args()
    work, held = make_work(options.work)
    if {"use", "train"} & set(options.part) and not (options.text and options.chats):
        parser.error("the parts use and train need --text and --chats")
    checkout = copy_checkout(options.checkout, work)
    print(f"MiniMind, {checkout.kind}; torch {torch.__version__}")
    if "classes" in options.part:
        show("Largest difference of log-probabilities", compare_classes(checkout, work, options.sizes))
    plan = Plan(checkout, work, options)
    if "train" in options.part:
        show("One epoch of SFT", compare_training(plan))
    if "use" in options.part:
        show("Answers", compare_use(plan))
    del held


if __name__ == "__main__":
    main()
