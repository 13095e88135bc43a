"""`tunesmith check`: the whole data set read before anything is trained, as a table, JSON or a page."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tunesmith.config.schema import PreviewConfig
from tunesmith.data.check import Check, Finding, check_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.prepare import label_rows
from tunesmith.display import raw_stream, to_html, visible
from tunesmith.errors import DataError
from tunesmith.files import write_text_atomic
from tunesmith.model.lengths import choose_lengths
from tunesmith.model.load import load_config
from tunesmith.model.reopen import require_one_reading
from tunesmith.model.tokenizer import load_encoder
from tunesmith.sources.read import find_sources, read_rows
from tunesmith.use.preview import require_writable

_SHOWN = 3  # rows that the table names; JSON and the page name more


def run_check(config: PreviewConfig, is_strict: bool, as_json: bool, html_path: Path | None) -> None:
    """Read everything, print what was found.

    Raises:
        DataError: there are errors, or with --strict warnings.
    """
    if html_path is not None:
        require_writable(html_path)
    data = config.data
    sources, eval_sources = find_sources(data.train), find_sources(data.eval or [])
    encoder = load_encoder(config.model, data, datetime.datetime.now())
    model_config = load_config(config.model, encoder.tokenizer)
    require_one_reading(config.model, encoder, model_config)
    max_seq_len = choose_lengths(model_config, data.max_seq_len).max_seq_len
    rows = label_rows(read_rows(sources, data.encoding, data.max_row_mb), encoder, data, max_seq_len)
    held_out = data.model_copy(update={"limit": None})
    eval_rows = (
        label_rows(read_rows(eval_sources, data.encoding, data.max_row_mb), encoder, held_out, max_seq_len)
        if data.eval
        else []
    )
    check = check_rows(with_progress(rows), eval_rows, encoder, data, max_seq_len)
    if as_json:
        print(json.dumps(check.to_json()))
    elif html_path is not None:
        write_text_atomic(html_path, render_page(check, config))
        print(f"written: {html_path}")
    if not as_json:
        show_check(check)
    findings = check.findings.sorted()
    if check.num_errors or (is_strict and findings):
        warnings = len(findings) - check.num_errors
        raise DataError(
            f"{count(check.num_errors, 'error')} and {count(warnings, 'warning')} in {count(check.ledger.rows, 'row')}"
            + ("" if check.num_errors else " (--strict: warnings count)")
            + ". The rows are named above; tunesmith preview shows how a row is trained."
        )


def count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def with_progress(rows: Iterable[LabelledRow]) -> Iterator[LabelledRow]:
    """A line that counts, where somebody watches."""
    console = Console(file=raw_stream(sys.stderr))
    if not console.is_terminal:
        yield from rows
        return
    columns = (TextColumn("reading"), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rows")
        shown = time.monotonic()
        for count, row in enumerate(rows, 1):
            yield row
            if time.monotonic() - shown > 0.2:
                progress.update(task, completed=count)
                shown = time.monotonic()


def facts(check: Check) -> list[tuple[str, str]]:
    """The numbers at the head of the report."""
    ledger = check.ledger
    share = ledger.target_tokens / ledger.tokens if ledger.tokens else 0.0
    how = ", ".join(f"{count:,} {name}" for name, count in ledger.count_how().most_common())
    tokens = f"{ledger.tokens:,} in {ledger.num_samples:,} samples, {share:.1%} trained, {ledger.tokens_lost:,} lost"
    lines = [
        ("rows", f"{ledger.rows:,}: {ledger.used:,} used, {ledger.refused:,} refused, {ledger.truncated:,} truncated"),
        ("labels", how or "none"),
        ("tokens", tokens),
        ("lengths", ", ".join(f"{name} {value:,}" for name, value in check.percentiles().items()) or "none"),
        ("scripts", ", ".join(f"{name} {count:,}" for name, count in check.languages.most_common()) or "none"),
    ]
    if check.eval_ledger.rows:
        eval_ledger = check.eval_ledger
        lines.append(("eval rows", f"{eval_ledger.rows:,}: {eval_ledger.used:,} used, {eval_ledger.refused:,} refused"))
    if not check.looked_for_near:
        lines.append(("not done", "near-duplicates: pip install 'tunesmith[check]'"))
    return lines


def show_check(check: Check) -> None:
    stream = raw_stream(sys.stdout)
    console = Console(file=stream, width=None if Console(file=stream).is_terminal else 140)
    for name, value in facts(check):
        console.print(Text(visible(f"{name:<10} {value}")))
    findings = check.findings.sorted()
    if not findings:
        console.print("No problems found; every row is used.")
        return
    table = Table("", "rows", "what", "where", "what to do")
    for finding in findings:
        style = "bold red" if finding.level == "error" else ""
        where = "\n".join(finding.rows[:_SHOWN]) + ("\n..." if finding.count > _SHOWN and finding.rows else "")
        cells = (finding.level, f"{finding.count:,}", finding.what, where, finding.advice)
        table.add_row(*(Text(visible(cell)) for cell in cells), style=style)
    console.print(table)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>tunesmith check</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
  color: #1b1f24; background: #fff }}
h1 {{ font-size: 1.3rem }} table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid #d0d7de;
  overflow-wrap: anywhere }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ white-space: nowrap; overflow-wrap: normal }}
.error td:first-child {{ color: #a40e26; font-weight: 600 }} code {{ font-size: .85rem; white-space: pre-wrap }}
@media (prefers-color-scheme: dark) {{ body {{ background: #0d1117; color: #e6edf3 }}
  td, th {{ border-color: #30363d }} .error td:first-child {{ color: #ff8182 }} }}
</style></head><body><h1>tunesmith check</h1>
<p>{data}</p><table>{facts}</table>
<h2>{errors} errors, {warnings} warnings</h2>
<table><tr><th></th><th>rows</th><th>what</th><th>where</th><th>what to do</th></tr>
{findings}</table></body></html>
"""


def render_page(check: Check, config: PreviewConfig) -> str:
    findings = check.findings.sorted()
    return _PAGE.format(
        data=to_html(f"{', '.join(config.data.train)} for {config.model.path}"),
        facts="".join(f"<tr><th>{to_html(k)}</th><td>{to_html(v)}</td></tr>" for k, v in facts(check)),
        errors=check.num_errors,
        warnings=len(findings) - check.num_errors,
        findings="\n".join(map(_row, findings)),
    )


def _row(finding: Finding) -> str:
    where = to_html("\n".join(finding.rows)) + ("\n..." if finding.count > len(finding.rows) > 0 else "")
    cells = (finding.level, f"{finding.count:,}", finding.what)
    tds = "".join(f"<td>{to_html(cell)}</td>" for cell in cells)
    return f'<tr class="{finding.level}">{tds}<td><code>{where}</code></td><td>{to_html(finding.advice)}</td></tr>'
