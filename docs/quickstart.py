"""The cells of docs/quickstart.ipynb, and the script that builds the notebook from them.

Usage: quickstart.py [--output FILE]    run every cell in a temporary folder and write the notebook with its outputs

The notebook needs no network: it trains the small base model that is part of the package.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

CELLS = [
    """# tunesmith in ten cells

Fine-tune a small model on chats given in Python, talk to it, train it longer, and do the same with a LoRA adapter.
It takes about a minute on a laptop's CPU and needs no network: the base model (2.8 million parameters) is part of the
package. Use a hub id such as `Qwen/Qwen2.5-0.5B` in its place for real work.""",
    """
from importlib import resources

import tunesmith

base = resources.files("tunesmith") / "demo" / "base"
""",
    """## Data

Rows in any of the usual formats, here OpenAI's `messages`. A file name, a hub id or a `datasets.Dataset` works too.""",
    """
colours = {"grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red"}
phrasings = ["What colour is {}?", "Tell me the colour of {}.", "{}: which colour?"]
rows = [
    {"messages": [{"role": "user", "content": phrasing.format(thing)}, {"role": "assistant", "content": colour}]}
    for phrasing in phrasings
    for thing, colour in colours.items()
]
len(rows), rows[0]
""",
    """## See what is trained

Marked tokens are trained, the rest is context. The labels are proven; a row whose labels cannot be is refused.""",
    """
labels = {"chat_template": "chatml", "max_seq_len": 64}
tunesmith.preview(model=base, data={"train": rows, **labels}, rows=2)
""",
    """
tunesmith.check(model=base, data={"train": rows, **labels})
""",
    """## Train

`optim`, `lora` and `train` take the keys of the config. The run is a folder; it resumes after a crash.""",
    """
run = tunesmith.train(
    model=base,
    data={"train": rows, **labels},
    output="runs/colours",
    optim={"lr": 2e-3},
    train={"epochs": 20, "micro_batch_tokens": 128},
)
run
""",
    """
[round(record["loss"], 3) for record in run.metrics[::8]]
""",
    """
run.ledger["train"]["files"]
""",
    """## Talk to it""",
    """
model = tunesmith.load(run)
model.reply("What colour is snow?", temperature=0)
""",
    """
model.batch([f"What colour is {thing}?" for thing in colours], temperature=0)
""",
    """
for piece in model.stream([{"role": "user", "content": "Tell me the colour of grass."}], temperature=0):
    print(piece, end="|")
""",
    """## Train it longer

The same as an uninterrupted run of that many steps.""",
    """
longer = run.resume(max_steps=run.metrics[-1]["step"] + 10)
longer.metrics[-1]["step"], round(longer.metrics[-1]["loss"], 4)
""",
    """## An adapter, merged into its base

The merge is checked against base and adapter before it appears.""",
    """
adapter = tunesmith.train(
    model=base,
    data={"train": rows, **labels},
    output="runs/adapter",
    lora={"kind": "lora", "rank": 8},
    optim={"lr": 1e-2},
    train={"epochs": 20, "micro_batch_tokens": 128},
)
merged = tunesmith.merge(adapter, output="runs/merged")
tunesmith.load(merged).reply("What colour is coal?", temperature=0)
""",
]


def run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell as Jupyter does; returns its printed output and the value of its last line as notebook outputs."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(True)
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    return outputs


def is_text(cell: str) -> bool:
    return not cell.startswith("\n")


def run_cells() -> list[list[dict[str, Any]]]:
    """Run every cell in the current folder, in order; returns the outputs of each."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return [[] if is_text(cell) else run_cell(cell, names) for cell in CELLS]


def notebook(outputs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The notebook in format 4.5."""
    cells = []
    for number, (cell, shown) in enumerate(zip(CELLS, outputs, strict=True)):
        kind = "markdown" if is_text(cell) else "code"
        source = cell.strip().splitlines(True)
        own = {} if is_text(cell) else {"execution_count": None, "outputs": shown}
        cells.append({"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source, **own})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("quickstart.ipynb"))
    output = parser.parse_args().output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        content = notebook(run_cells())
        text = json.dumps(content, indent=1, ensure_ascii=False).replace(os.path.realpath(folder), "/home/me")
        os.chdir(output.parent)
    output.write_text(text + "\n", encoding="utf-8")
