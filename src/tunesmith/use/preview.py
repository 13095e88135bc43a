"""`tunesmith preview`: rows as the model sees them, trained tokens coloured."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from rich.console import Console
from rich.text import Text

from tunesmith.config.schema import PreviewConfig
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.display import raw_stream, visible
from tunesmith.encode.encoder import Encoder
from tunesmith.files import write_text_atomic
from tunesmith.sources.read import Sources
from tunesmith.use.labels import open_data
from tunesmith.use.pages import render_page, require_writable

_TRAINED = "black on bright_green"


@dataclass(frozen=True, eq=False, repr=False)
class Preview(Sequence[LabelledRow]):
    """Labelled rows. A notebook shows them coloured; `print` puts trained text into ⟦ ⟧.

    Attributes:
        rows: each with its status, reason and samples (`input_ids`, `loss_mask`).
        encoder: what the rows were encoded with.
    """

    rows: list[LabelledRow]
    encoder: Encoder

    @overload
    def __getitem__(self, index: int) -> LabelledRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[LabelledRow]: ...
    def __getitem__(self, index: int | slice) -> LabelledRow | list[LabelledRow]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return "\n".join(text.plain for text in self.texts(is_coloured=False))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.to_html("rows")

    def to_json(self) -> list[dict[str, Any]]:
        """One object a row, as `tunesmith preview --json` prints them."""
        return [row_to_json(row) for row in self.rows]

    def to_html(self, page: str = "preview") -> str:
        """A self-contained page; every text in it is escaped."""
        rows = [
            {
                "head": describe_row(row),
                "is_refused": row.status == "refused",
                "samples": [list(iterate_runs(sample, self.encoder)) for sample in row.samples],
            }
            for row in self.rows
        ]
        return render_page(page, rows=rows, stop=self.encoder.stop.text)

    def texts(self, is_coloured: bool) -> Iterator[Text]:
        """Lines for a terminal: trained text on a green ground, or in ⟦ ⟧ where there are no colours."""
        for row in self.rows:
            yield Text(visible(describe_row(row)), style="bold")
            for sample in row.samples:
                text = Text()
                for decoded, is_trained in iterate_runs(sample, self.encoder):
                    piece = visible(decoded)
                    if is_trained:
                        text.append(piece if is_coloured else f"⟦{piece}⟧", style=_TRAINED)
                    else:
                        text.append(piece, style="dim")
                yield text
                yield Text()
        if self.rows:
            sign = "green" if is_coloured else "⟦ ⟧"
            yield Text(f"trained: {sign}; replies end with {visible(self.encoder.stop.text)}", style="dim")


def preview_rows(config: PreviewConfig, num_rows: int, sources: Mapping[str, Sources] | None = None) -> Preview:
    """Label the first rows exactly as training would.

    Args:
        sources: as in `open_data`.
    """
    data = open_data(config, sources)
    return Preview(list(data.rows(num_rows)), data.encoder)


def run_preview(config: PreviewConfig, num_rows: int, as_json: bool, html_path: Path | None) -> None:
    """Show the first rows: on the terminal, as JSON, or as a page."""
    if html_path is not None:
        require_writable(html_path)
    preview = preview_rows(config, num_rows)
    if as_json:
        for row in preview.to_json():
            print(json.dumps(row))  # ASCII: the same bytes in any terminal
    elif html_path is not None:
        write_text_atomic(html_path, preview.to_html())
        print(f"written: {html_path}")
    else:
        console = Console(file=raw_stream(sys.stdout), soft_wrap=True, highlight=False)
        for text in preview.texts(is_coloured=console.is_terminal and not console.no_color):
            console.print(text)


def row_to_json(row: LabelledRow) -> dict[str, Any]:
    return {
        "file": row.file,
        "row": row.number,
        "status": row.status,
        "how": row.how or None,
        "reason": row.reason or None,
        "tokens_lost": row.tokens_lost,
        "notes": list(row.notes),
        "samples": [
            {"input_ids": sample.input_ids.tolist(), "loss_mask": sample.loss_mask.tolist()} for sample in row.samples
        ],
    }


def iterate_runs(sample: Sample, encoder: Encoder) -> Iterator[tuple[str, bool]]:
    """Text of each run of equally masked tokens; a character's bytes may part only where the mask changes."""
    pairs = zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True)
    for is_trained, run in itertools.groupby(pairs, key=lambda pair: bool(pair[1])):
        text = encoder.tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        yield text, is_trained


def describe_row(row: LabelledRow) -> str:
    """The line above a row: its place, status, tokens and notes."""
    if row.status == "refused":
        return f"{row.where}  refused: {row.reason}"
    tokens = sum(len(sample.input_ids) for sample in row.samples)
    trained = sum(int(sample.loss_mask.sum()) for sample in row.samples)
    parts = [f"{row.where}  used ({row.how})", f"{tokens} tokens, {trained} trained"]
    if row.reason:
        parts.append(row.reason + (f", {row.tokens_lost} tokens lost" if row.tokens_lost else ""))
    return ", ".join([*parts, *row.notes])
