"""Print the outcome table of docs/data.md: the result for every file in a folder of public data."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from transformers import AutoTokenizer

from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import Ledger
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError
from tunesmith.model.tokenizer import build_encoder
from tunesmith.sources.read import find_sources, read_rows

MAX_SEQ_LEN = 2048


def load_table_encoder(folder: Path) -> Encoder:
    return build_encoder(AutoTokenizer.from_pretrained(folder), None, {}, datetime.datetime(2026, 1, 1))


def outcome_of(path: Path, encoder: Encoder) -> tuple[str, str, str]:
    """Rows used, rows refused ("all" for a file that is refused as a whole), and the reason."""
    data = DataSection(train=[str(path)])
    ledger = Ledger()
    try:
        for row in label_rows(
            read_rows(find_sources(data.train), data.encoding, data.max_row_mb), encoder, data, MAX_SEQ_LEN
        ):
            ledger.add(row)
    except DataError as error:
        reason = str(error).removeprefix(f"{path}:1: ").split(" Formats known:")[0]
        return "0", "all", reason
    notes = [f"{reason}: {count}" for reason, count in ledger.count_reasons().items()]
    if ledger.num_bad > data.max_refused * ledger.rows:
        notes.append("more than data.max_refused, so the command ends")
    if ledger.truncated:
        notes.append(f"{ledger.truncated} truncated, {ledger.tokens_lost:,} tokens lost")
    if ledger.split:
        notes.append(f"raw text, {ledger.num_samples} samples")
    notes += [f"{note}: {count}" for note, count in ledger.count_notes().items()]
    return f"{ledger.used:,}", f"{ledger.refused:,}", "; ".join(notes)


def main(data: Path, tokenizer: Path) -> None:
    encoder = load_table_encoder(tokenizer)
    print("| file | used | refused | why, and what helps |\n| --- | ---: | ---: | --- |")
    for path in sorted(p for p in data.rglob("*") if p.is_file() and "LICENSE" not in p.name):
        used, refused, why = outcome_of(path, encoder)
        print(f"| `{path.relative_to(data)}` | {used} | {refused} | {why.replace('|', chr(92) + '|')} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder that docs/data.md describes")
    parser.add_argument("tokenizer", type=Path, help="folder of a tokenizer")
    options = parser.parse_args()
    main(options.data, options.tokenizer)
