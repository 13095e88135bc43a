"""`tunesmith check`: the whole data set read before anything is trained, as a table, JSON or a page."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tunesmith.config.schema import PreviewConfig
from tunesmith.data.check import Check, Finding, check_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.display import raw_stream, visible
from tunesmith.errors import DataError
from tunesmith.files import write_text_atomic
from tunesmith.sources.read import Sources
from tunesmith.use.labels import open_data
from tunesmith.use.pages import render_page, require_writable

_SHOWN = 3  # rows that the table names; JSON and the page name more


@dataclass(frozen=True, repr=False)
class CheckResult:
    """What a check found. A notebook shows it as tables.

    Attributes:
        check: counts, lengths and scripts of the whole data set.
    """

    check: Check

    def __repr__(self) -> str:
        lines = [f"{name:<10} {value}" for name, value in facts(self.check)]
        lines += [f"{f.level:<10} {f.count:,} {f.what}: {', '.join(f.rows[:_SHOWN])}" for f in self.findings]
        return visible("\n".join(lines))

    @property
    def findings(self) -> list[Finding]:
        """Errors first, each with its count, the first rows and what to do."""
        return self.check.findings.sorted()

    @property
    def num_errors(self) -> int:
        return self.check.num_errors

    def to_json(self) -> dict[str, Any]:
        """The object that `tunesmith check --json` prints."""
        return self.check.to_json()

    def to_html(self, page: str = "check", data: str = "") -> str:
        """A self-contained page; every text in it is escaped."""
        values = {"facts": facts(self.check), "findings": self.findings, "num_errors": self.num_errors}
        return render_page(page, data=data, **values)

    def _repr_html_(self) -> str:
        return self.to_html("findings")


def check_data(
    config: PreviewConfig,
    sources: Mapping[str, Sources] | None = None,
    watch: Callable[[Iterable[LabelledRow]], Iterable[LabelledRow]] = iter,
) -> CheckResult:
    """Read and label every row of data.train and data.eval, and collect what is wrong or odd.

    Args:
        sources: as in `open_data`.
        watch: gets the rows as they are read and passes them on, for a progress display.
    """
    data = open_data(config, sources)
    eval_rows = data.eval_rows() if config.data.eval else []
    return CheckResult(check_rows(watch(data.rows()), eval_rows, data.encoder, config.data, data.max_seq_len))


def run_check(config: PreviewConfig, is_strict: bool, as_json: bool, html_path: Path | None) -> None:
    """Print what `check_data` finds: as a table, as JSON, or as a table and a page.

    Raises:
        DataError: there are errors, or with --strict warnings.
    """
    if html_path is not None:
        require_writable(html_path)
    result = check_data(config, watch=with_progress)
    check = result.check
    if as_json:
        print(json.dumps(result.to_json()))
    elif html_path is not None:
        data = f"{', '.join(config.data.train)} for {config.model.path}"
        write_text_atomic(html_path, result.to_html(data=data))
        print(f"written: {html_path}")
    if not as_json:
        show_check(check)
    findings = result.findings
    if check.num_errors or (is_strict and findings):
        warnings = len(findings) - check.num_errors
        raise DataError(
            f"{count(check.num_errors, 'error')} and {count(warnings, 'warning')} in {count(check.ledger.rows, 'row')}"
            + ("" if check.num_errors else " (--strict: warnings count)")
            + ". The rows are named above; tunesmith preview shows how a row is trained.",
            code="check-findings",
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
