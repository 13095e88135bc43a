"""One row from its file to the gradient, with the real values of every stage, for docs/architecture.md.

Usage: one_row.py [--write]    print the stages, or write them into the page (as `make docs` does)

The model is the small base of `tunesmith demo`, in fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tunesmith.config.data_keys import FieldsSection
from tunesmith.config.schema import ModelSection, PreviewConfig
from tunesmith.data.pack import build_batch
from tunesmith.data.store import StoreWriter, open_store
from tunesmith.demo.run import base_folder
from tunesmith.model.head import choose_head_path
from tunesmith.model.isolation import use_packed_attention
from tunesmith.model.load import load_config, load_model
from tunesmith.model.loss import SupervisedLM, supervised_loss
from tunesmith.rows.formats import parse_row
from tunesmith.sources.read import find_sources, read_rows
from tunesmith.use.labels import open_data

ROWS = [
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]},
    {"messages": [{"role": "user", "content": "Is ice cold?"}, {"role": "assistant", "content": "yes"}]},
]


def stages() -> Iterator[tuple[str, str, str]]:
    """Title, what happens, and the values."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "chats.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        yield from _from_file_to_ids(file)
        yield from _from_ids_to_gradient(file, folder / "tokens")


def _config(file: Path) -> PreviewConfig:
    data = {"train": [str(file)], "chat_template": "chatml", "max_seq_len": 64}
    return PreviewConfig.model_validate({"model": {"path": str(base_folder())}, "data": data})


def _from_file_to_ids(file: Path) -> Iterator[tuple[str, str, str]]:
    raw = next(read_rows(find_sources([str(file)])))
    yield "a row", "`sources/read.py` reads it from its file, with its place.", f"chats.jsonl:{raw.number}\n{raw.value}"
    conversation = parse_row(raw.value, "auto", FieldsSection())
    said = "\n".join(f"Message(role={m.role!r}, content={m.content!r})" for m in conversation.messages)
    yield "a conversation", "`rows/formats.py` recognises the format by the keys.", said
    data = open_data(_config(file))
    row = next(data.rows(1))
    sample = row.samples[0]
    ids = sample.input_ids.tolist()
    text = data.encoder.tokenizer.decode(ids)
    yield "a text", "`encode/render.py` renders it by the chat template and finds the replies in it.", text
    pieces = [data.encoder.tokenizer.decode([token]).replace("\n", "\\n") for token in ids]
    lines = [f"{'token':<14}{'id':>6}{'loss_mask':>11}"]
    lines += [f"{p:<14}{i:>6}{m:>11}" for p, i, m in zip(pieces, ids, sample.loss_mask.tolist(), strict=True)]
    what = "`encode/encoder.py` encodes the text, `data/labels.py` proves which ids are the reply and its stop token."
    yield "ids and loss_mask", what, "\n".join(lines)


def _from_ids_to_gradient(file: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    data = open_data(_config(file))
    with StoreWriter(folder) as writer:
        for row in data.rows():
            writer.add(row)
    store = open_store(folder)
    files = [f"{path.name:<15}{path.stat().st_size:>5} bytes" for path in sorted(folder.glob("*.bin"))]
    what = (
        "`data/store.py` keeps all samples on disk, four bytes a token and one for its mask, and maps them into memory."
    )
    yield "the token store", what, "\n".join(files)
    batch = build_batch(store, [0, 1])
    values = [
        f"input_ids     {batch.input_ids[0].tolist()}",
        f"position_ids  {batch.position_ids[0].tolist()}",
        f"targets       {batch.targets.tolist()}",
        f"target_at     {batch.target_at.tolist()}",
        f"layout        documents of {batch.layout.lens} tokens",
    ]
    what = (
        "`data/pack.py` joins documents without padding. Positions start again at 0 in each; the target of position i "
        "is token i + 1."
    )
    yield "a packed batch", what, "\n".join(values)
    section = ModelSection(path=str(base_folder()))
    model = load_model(section, load_config(section, data.encoder.tokenizer), torch.float32, seed=0)
    use_packed_attention(model)
    lm = SupervisedLM(model, is_packed=True, head_path=choose_head_path(model, True))
    lm.eval()
    sums = supervised_loss(lm, batch)
    values = [
        f"loss sum {sums.loss.item():.3f} over {batch.num_targets} targets",
        f"mean       {sums.loss.item() / batch.num_targets:.3f}",
    ]
    what = "`model/attention.py` keeps the documents apart, `model/loss.py` sums the loss over the targets alone."
    yield "the loss", what, "\n".join(values)
    (sums.loss / batch.num_targets).backward()
    norms = {
        name: parameter.grad.norm().item() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    largest = sorted(norms.items(), key=lambda item: -item[1])[:3]
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    lines = [f"{name:<44}{norm:>8.3f}" for name, norm in [*largest, ("all parameters", total)]]
    what = "`training/step.py` divides by the targets of the whole step, clips the norm, and lets the optimizer update."
    yield "the gradient", what, "\n".join(lines)


def one_row() -> str:
    """All stages as Markdown."""
    texts = (f"{n}. **{title}**: {what}\n\n```\n{values}\n```" for n, (title, what, values) in enumerate(stages(), 1))
    return "\n\n".join(texts)


PAGE, START, END = Path(__file__).with_name("architecture.md"), "<!-- row: made by `make docs` -->\n", "\n<!-- /row -->"


def write_page() -> None:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{head}{START}{one_row()}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/architecture.md")
    if parser.parse_args().write:
        write_page()
    else:
        print(one_row())
