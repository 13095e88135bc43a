"""Cost of the label proof: our labelling compared with rendering and encoding alone, alternating, medians."""

from __future__ import annotations

import argparse
import copy
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from tunesmith.config.data_keys import DataSection, FieldsSection
from tunesmith.data.labelling import label_rows
from tunesmith.model.tokenizer import build_encoder
from tunesmith.rows.conversation import Conversation, RowRefused
from tunesmith.rows.formats import parse_row
from tunesmith.sources.read import find_sources, read_rows


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(tokenizer_name: str, data_path: str, rounds: int, template: str | None) -> None:
    encoder = build_encoder(AutoTokenizer.from_pretrained(tokenizer_name), template, {}, datetime.datetime.now())
    data = DataSection(train=[data_path])
    raw = list(read_rows(find_sources([data_path])))
    usable = []
    for row in raw:
        try:
            parsed = parse_row(copy.deepcopy(row.value), "auto", FieldsSection())
        except RowRefused:
            continue
        if isinstance(parsed, Conversation):
            usable.append(row)

    def plain() -> None:
        """Parse, render the whole chat once, encode it once, 256 rows per batch; gives no labels."""
        for start in range(0, len(usable), 256):
            texts = []
            for row in usable[start : start + 256]:
                parsed = parse_row(row.value, "auto", FieldsSection())
                assert isinstance(parsed, Conversation)
                texts.append(encoder.renderer().render(parsed.messages, parsed.tools))
            encoder.encode_texts(texts)

    def proven() -> None:
        for _ in label_rows(iter(usable), encoder, data, 4096):
            pass

    plain(), proven()
    pairs = [(timed(plain), timed(proven)) for _ in range(rounds)]
    one, two = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(
        f"{Path(data_path).name}: {len(usable):,} chats, {one:.2f} s without labels, {two:.2f} s proven: x {ratio:.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="tokenizer folder")
    parser.add_argument("data", nargs="+", help="files of chats, each measured separately")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--template", metavar="FILE", help="a .jinja file instead of the tokenizer's template")
    options = parser.parse_args()
    for path in options.data:
        measure(options.tokenizer, path, options.rounds, options.template)
