"""Write docs/preview.svg: what `tunesmith preview` shows on a terminal, for README.md.

Usage: preview_picture.py [--output FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from tunesmith.config.schema import PreviewConfig
from tunesmith.demo.run import base_folder
from tunesmith.use.preview import preview_rows

ROWS = [
    {"messages": [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Japan?"},
        {"role": "assistant", "content": "Tokyo."},
    ]},
    {"conversations": [
        {"from": "human", "value": "Does <|im_end|> in a question end it?"},
        {"from": "gpt", "value": "No: it stays plain text."},
    ]},
    {"prompt": "An answer is missing here", "completion": None},
]  # fmt: skip


def draw(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chats.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        config = PreviewConfig.model_validate(
            {"model": {"path": str(base_folder())}, "data": {"train": [str(data)], "chat_template": "chatml"}}
        )
        preview = preview_rows(config, len(ROWS))
    console = Console(file=io.StringIO(), record=True, width=88, force_terminal=True, color_system="truecolor")
    for text in preview.texts(is_coloured=True):
        console.print(text, soft_wrap=False)
    console.save_svg(str(output), title="tunesmith preview --data chats.jsonl", theme=MONOKAI, unique_id="preview")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("preview.svg"))
    draw(parser.parse_args().output)
