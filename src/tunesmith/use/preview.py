"""`tunesmith preview`: rows as the model will see them, trained tokens coloured."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tunesmith.config.schema import PreviewConfig
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.prepare import label_rows
from tunesmith.display import raw_stream, to_html, visible
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import UsageError
from tunesmith.files import write_text_atomic
from tunesmith.model.lengths import choose_lengths
from tunesmith.model.load import load_config
from tunesmith.model.reopen import require_one_reading
from tunesmith.model.tokenizer import load_encoder
from tunesmith.sources.read import find_sources, read_rows

_TRAINED = "black on bright_green"


def run_preview(config: PreviewConfig, num_rows: int, as_json: bool, html_path: Path | None) -> None:
    """Label the first rows exactly as training would, and show them."""
    if html_path is not None:
        require_writable(html_path)
    sources = find_sources(config.data.train)
    encoder = load_encoder(config.model, config.data, datetime.datetime.now())
    model_config = load_config(config.model, encoder.tokenizer)
    require_one_reading(config.model, encoder, model_config)
    max_seq_len = choose_lengths(model_config, config.data.max_seq_len).max_seq_len
    rows = read_rows(sources, config.data.encoding, config.data.max_row_mb)
    labelled = label_rows(itertools.islice(rows, num_rows), encoder, config.data, max_seq_len)
    if as_json:
        for row in labelled:
            print(json.dumps(row_to_json(row)))  # ASCII: the same bytes in any terminal
    elif html_path is not None:
        write_text_atomic(html_path, render_page(list(labelled), encoder))
        print(f"written: {html_path}")
    else:
        show_rows(list(labelled), encoder)


def require_writable(path: Path) -> None:
    """Asked before the work, so that it is not lost at its end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"--html {path}: is a pipe or a device, which the page would replace; name a file.")
    if path.is_dir():
        raise UsageError(f"--html {path}: is a folder; give the name of a file in it, as in {path / 'preview.html'}.")
    if not path.parent.is_dir():
        raise UsageError(f"--html {path}: there is no folder {path.parent}; make it first, or name another.")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--html {path}: nothing may be written to {path.parent.resolve()}; name another folder.")


def row_to_json(row: LabelledRow) -> dict[str, object]:
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
    if row.status == "refused":
        return f"{row.where}  refused: {row.reason}"
    tokens = sum(len(sample.input_ids) for sample in row.samples)
    trained = sum(int(sample.loss_mask.sum()) for sample in row.samples)
    parts = [f"{row.where}  used ({row.how})", f"{tokens} tokens, {trained} trained"]
    if row.reason:
        parts.append(row.reason + (f", {row.tokens_lost} tokens lost" if row.tokens_lost else ""))
    return ", ".join([*parts, *row.notes])


def show_rows(rows: list[LabelledRow], encoder: Encoder) -> None:
    """Trained text on a green ground; in ⟦ ⟧ as well where the output has no colours."""
    console = Console(file=raw_stream(sys.stdout), soft_wrap=True, highlight=False)
    coloured = console.is_terminal and not console.no_color
    for row in rows:
        console.print(Text(visible(describe_row(row)), style="bold"))
        for sample in row.samples:
            text = Text()
            for decoded, is_trained in iterate_runs(sample, encoder):
                piece = visible(decoded)
                if is_trained:
                    text.append(piece if coloured else f"⟦{piece}⟧", style=_TRAINED)
                else:
                    text.append(piece, style="dim")
            console.print(text)
            console.print()
    if rows:
        console.print(
            f"trained: {'green' if coloured else '⟦ ⟧'}; replies end with {visible(encoder.stop.text)}",
            style="dim",
            markup=False,
        )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>tunesmith preview</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1b1f24; background: #fff; }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: .95rem; margin: 1.6rem 0 .4rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #d0d7de; border-radius: 6px;
  padding: .8rem; margin: 0 0 .6rem; color: #57606a }}
mark {{ background: #b7f0c4; color: #0b2e13; border-radius: 2px }}
.refused {{ color: #a40e26 }}
@media (prefers-color-scheme: dark) {{ body {{ background: #0d1117; color: #e6edf3 }}
  pre {{ border-color: #30363d; color: #8b949e }} mark {{ background: #1f6f37; color: #eaffef }}
  .refused {{ color: #ff8182 }} }}
</style></head><body><h1>tunesmith preview</h1>
<p><mark>Marked</mark> tokens are trained; the rest is context. Replies end with <code>{stop}</code>.</p>
{rows}</body></html>
"""


def render_page(rows: list[LabelledRow], encoder: Encoder) -> str:
    """One self-contained page; every text in it is escaped."""
    parts = []
    for row in rows:
        kind = ' class="refused"' if row.status == "refused" else ""
        parts.append(f"<h2{kind}>{to_html(describe_row(row))}</h2>")
        for sample in row.samples:
            pieces = (
                f"<mark>{to_html(text)}</mark>" if is_trained else to_html(text)
                for text, is_trained in iterate_runs(sample, encoder)
            )
            parts.append(f"<pre>{''.join(pieces)}</pre>")
    return _PAGE.format(stop=to_html(encoder.stop.text), rows="\n".join(parts))
