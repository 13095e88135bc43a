"""`tunesmith preview`: rows as the model sees them: whose turn each token is in, and which tokens are trained."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from rich.console import Console
from rich.text import Text

from tunesmith.config.choices import PREVIEW_KINDS
from tunesmith.config.data_keys import DataSection
from tunesmith.config.schema import PreviewConfig
from tunesmith.data.fit import NOTE_CUT_REPLY
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.display import LEVEL_STYLES, one_line, raw_stream, visible
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import UsageError
from tunesmith.files import write_text_atomic
from tunesmith.sources.names import name_row
from tunesmith.sources.read import Sources
from tunesmith.use.labels import RowRange, open_data, parse_rows, shorten_names, with_progress
from tunesmith.use.pages import render_page, require_writable
from tunesmith.use.turns import Turn, find_turns

NUM_ROWS = 5  # where neither a number nor rows are given
_TRAINED = "black on bright_green"
_ROLE_STYLES = {
    "system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", "tools": "blue", "documents": "blue",
}  # fmt: skip
_GUTTER = 9  # cells of a role's name
_RAW = 1000  # characters that are shown of a refused row

_KINDS: dict[str, Callable[[LabelledRow], bool]] = {
    "refused": lambda row: row.status == "refused",
    "used": lambda row: row.status == "used",
    "truncated": lambda row: row.reason == "truncated",
    "cut": lambda row: row.num_cut > 0,
    "split": lambda row: row.reason == "split",
    "noted": lambda row: bool(row.notes),
    "unrolled": lambda row: row.how == "unrolled",
    "composed": lambda row: row.how == "composed",
}


@dataclass(frozen=True, eq=False, repr=False)
class Preview(Sequence[LabelledRow]):
    """Labelled rows. A notebook shows them coloured; `print` puts trained text into ⟦ ⟧.

    Attributes:
        rows: each with its status, reason and samples (`input_ids`, `loss_mask`).
        encoder: what the rows were encoded with.
        data: the config's section, which decides how a row is rendered.
        num_read: rows that were read for these.
    """

    rows: list[LabelledRow]
    encoder: Encoder
    data: DataSection
    num_read: int = 0

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
        names = shorten_names(row.file for row in self.rows)
        rows = [
            {
                "name": name_row(names[row.file], row.number),
                "where": row.where,
                "status": row.status,
                "facts": list(describe_labels(row)),
                "reason": row.reason if row.status == "refused" else "",
                "warnings": [note for note in row.notes if note == NOTE_CUT_REPLY],
                "notes": [note for note in row.notes if note != NOTE_CUT_REPLY],
                "raw": row.start(_RAW, as_in_file=True) if row.status == "refused" else "",
                "samples": [
                    [{"role": turn.role, "runs": list(iterate_runs(sample, self.encoder, turn))} for turn in turns]
                    for sample, turns in zip(row.samples, find_turns(row, self.encoder, self.data), strict=True)
                ],
            }
            for row in self.rows
        ]
        return render_page(page, rows=rows, stop=self.encoder.stop.text)

    def texts(self, is_coloured: bool, width: int | None = None) -> Iterator[Text]:
        """Lines for a terminal: each turn beside its role, trained text on a green ground or in ⟦ ⟧.

        Args:
            width: of the terminal, for breaking long lines beside their role; None leaves them long.
        """
        names = shorten_names(row.file for row in self.rows)
        for row in self.rows:
            yield from _describe(row, names[row.file])
            for sample, turns in zip(row.samples, find_turns(row, self.encoder, self.data), strict=True):
                for turn in turns:
                    yield _show_turn(turn, iterate_runs(sample, self.encoder, turn), is_coloured, width)
                yield Text()
        if self.rows:
            sign = "green" if is_coloured else "⟦ ⟧"
            yield Text(f"trained: {sign}; replies end with {visible(self.encoder.stop.text)}", style="dim")


def preview_rows(
    config: PreviewConfig,
    num_rows: int | None = None,
    sources: Mapping[str, Sources] | None = None,
    rows: Sequence[RowRange] = (),
    only: Sequence[str] = (),
    watch: Callable[[Iterable[LabelledRow]], Iterable[LabelledRow]] = iter,
) -> Preview:
    """Label rows exactly as training would.

    Args:
        num_rows: how many at most; default: all of `rows`, else the first 5.
        sources: as in `open_data`.
        rows: the rows to take; default: all of data.train, in order.
        only: kinds of rows to take (PREVIEW_KINDS); default: all.
        watch: gets the rows as they are read and passes them on, for a progress display.
    """
    data = open_data(config, sources)
    count = num_rows if num_rows is not None or rows else NUM_ROWS
    reads = itertools.count()
    labelled = data.pick_rows(rows) if rows else data.rows(None if only else count)
    counted = (row for row in watch(labelled) if next(reads) >= 0)
    taken = (row for row in counted if not only or any(_KINDS[kind](row) for kind in only))
    return Preview(list(itertools.islice(taken, count)), data.encoder, data.data, next(reads))


def choose_rows(
    num_rows: int | None, row: int | str | Iterable[object], only: str | Iterable[str]
) -> tuple[list[RowRange], list[str], int | None]:
    """What is asked for in Python: rows, kinds, and how many rows have to be read of data that may be endless.

    Raises:
        UsageError: a value means nothing.
    """
    if num_rows is not None and (not isinstance(num_rows, int) or num_rows < 1):
        raise UsageError(f"rows: must be a whole number of 1 or more, such as 5, not {num_rows!r}.", code="rows-value")
    asked, kinds = parse_rows(row), check_kinds(only)
    last = max((one.last for one in asked), default=0)
    return asked, kinds, last + 1 if asked else None if kinds else num_rows or NUM_ROWS  # an index counts from 0


def check_kinds(only: str | Iterable[str]) -> list[str]:
    """Raises:
    UsageError: there are no rows of that kind.
    """
    kinds = [only] if isinstance(only, str) else list(only)
    for kind in kinds:
        if kind not in PREVIEW_KINDS:
            raise UsageError(f"only: {kind!r}; give {', '.join(PREVIEW_KINDS)}.", code="preview-kind")
    return kinds


def run_preview(
    config: PreviewConfig,
    num_rows: int | None,
    as_json: bool,
    html_path: Path | None,
    words: Sequence[str] = (),
    only: Sequence[str] = (),
) -> None:
    """Show rows on the terminal, as JSON, or as a page.

    Args:
        words: FILE:ROW as typed.
    """
    rows = parse_rows(words)
    if html_path is not None:
        require_writable(html_path)
    preview = preview_rows(config, num_rows, None, rows, only, with_progress if only else iter)
    if as_json:
        for row in preview.to_json():
            print(json.dumps(row))  # ASCII: the same bytes in any terminal
    elif html_path is not None:
        write_text_atomic(html_path, preview.to_html())
        print(f"written: {html_path}")
    else:
        console = Console(file=raw_stream(sys.stdout), soft_wrap=True, highlight=False)
        width = console.width if console.is_terminal else None
        for text in preview.texts(is_coloured=console.is_terminal and not console.no_color, width=width):
            console.print(text)
    if not preview.rows:
        read = f"{preview.num_read:,} row{'' if preview.num_read == 1 else 's'} read"
        print(f"no row is {' or '.join(only)} ({read})", file=sys.stderr)


def row_to_json(row: LabelledRow) -> dict[str, Any]:
    return {
        "file": row.file,
        "row": row.number,
        "status": row.status,
        "how": row.how or None,
        "reason": row.reason or None,
        "tokens_lost": row.tokens_lost,
        "system_prompt_added": row.system_prompt,
        "empty_think_removed": row.loses_think,
        "notes": list(row.notes),
        "samples": [
            {"input_ids": sample.input_ids.tolist(), "loss_mask": sample.loss_mask.tolist()} for sample in row.samples
        ],
    }


def iterate_runs(sample: Sample, encoder: Encoder, turn: Turn | None = None) -> Iterator[tuple[str, bool]]:
    """Text of each run of equally masked tokens of a turn; a character's bytes may part only where the mask changes."""
    part = slice(turn.start, turn.end) if turn else slice(None)
    pairs = zip(sample.input_ids[part].tolist(), sample.loss_mask[part].tolist(), strict=True)
    for is_trained, run in itertools.groupby(pairs, key=lambda pair: bool(pair[1])):
        text = encoder.tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        yield text, is_trained


def describe_labels(row: LabelledRow) -> Iterator[str]:
    """How a used row is labelled, in parts."""
    if row.status == "refused":
        return
    yield row.how
    tokens = sum(len(sample.input_ids) for sample in row.samples)
    yield f"{tokens:,} tokens, {sum(int(sample.loss_mask.sum()) for sample in row.samples):,} trained"
    if len(row.samples) > 1:
        yield f"{len(row.samples)} samples"
    if row.reason:
        yield row.reason + (f", {row.tokens_lost:,} tokens lost" if row.tokens_lost else "")
    if row.system_prompt is not None:
        yield "system prompt added"
    if row.loses_think:
        yield "empty think block removed"


def _describe(row: LabelledRow, name: str) -> Iterator[Text]:
    """The lines above a row: its place and status, then what else is to be said about it."""
    where = one_line(name_row(name, row.number))
    if row.status == "refused":
        yield Text(f"{where}  refused: {one_line(row.reason)}", style=LEVEL_STYLES["error"])
        if start := row.start(_RAW, as_in_file=True):
            yield Text(one_line(start), style="dim")
        yield Text()
        return
    how, *facts = describe_labels(row)
    yield Text(", ".join([f"{where}  used ({how})", *facts]), style="bold")
    for note in row.notes:
        is_warning = note == NOTE_CUT_REPLY
        yield Text(f"{'warning' if is_warning else 'note'}: {one_line(note)}", LEVEL_STYLES["warning"] * is_warning)


def _show_turn(turn: Turn, runs: Iterable[tuple[str, bool]], is_coloured: bool, width: int | None) -> Text:
    """A turn's text behind its role; further lines of it begin below the text."""
    text = Text()
    for decoded, is_trained in runs:
        piece = visible(decoded)
        if is_trained:
            text.append(piece if is_coloured else f"⟦{piece}⟧", style=_TRAINED)
        else:
            text.append(piece, style=_ROLE_STYLES.get(turn.role, "") if turn.role != "assistant" else "dim")
    if not turn.role:
        return text
    style = f"bold {_ROLE_STYLES.get(turn.role, '')}"
    shown = Text()
    lines: Iterable[Text] = text.split("\n", allow_blank=not text.plain.endswith("\n"))
    if width:
        room = max(1, width - _GUTTER - 3)
        console = Console(width=room)
        lines = (part for line in lines for part in (line.wrap(console, room, overflow="fold") or [line]))
    for number, line in enumerate(lines):
        head = turn.role if number == 0 else ""
        shown.append("\n" if number else "").append(f"{head:>{_GUTTER}} ", style=style).append("│ ", style="dim")
        shown.append_text(line)
    return shown
