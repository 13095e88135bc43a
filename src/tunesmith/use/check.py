"""`tunesmith check`: the whole data set read before anything is trained, as text, JSON or a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from tunesmith.config.schema import PreviewConfig
from tunesmith.data.check import Check, Finding, Place, check_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.display import LEVEL_STYLES, one_line, raw_stream
from tunesmith.errors import DataError
from tunesmith.files import write_text_atomic
from tunesmith.sources.names import name_row
from tunesmith.sources.read import Sources
from tunesmith.use.labels import open_data, shorten_names, with_progress
from tunesmith.use.pages import render_page, require_writable

_SHOWN = 3  # rows of a finding on a terminal; JSON and the page name more
_SHOWN_FILES = 8
_WIDTH = 140  # where the output is no terminal
_INDENT = 10
_LEAST_START = 16  # cells of a row's text that are worth a place beside its name


@dataclass(frozen=True, repr=False)
class CheckResult:
    """What a check found. A notebook shows it as a page.

    Attributes:
        check: counts, lengths and scripts of the whole data set.
    """

    check: Check

    def __repr__(self) -> str:
        lines = [f"{name:<10} {value}" for name, value in facts(self.check)]
        lines += [f"{f.level:<10} {f.count:,} {f.what}: {', '.join(f.rows[:_SHOWN])}" for f in self.findings]
        return "\n".join(map(one_line, lines))

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

    def to_html(self, page: str = "check", model: str = "") -> str:
        """A self-contained page; every text in it is escaped."""
        names = short_names(self.check)
        findings = [
            {
                "level": finding.level,
                "what": finding.what,
                "advice": finding.advice,
                "count": finding.count,
                "places": [
                    {"full": p.where, "name": name_place(p, names), "sign": p.sign, "twin": name_twin(p, names),
                     "start": p.start}
                    for p in finding.places
                ],
            }
            for finding in self.findings
        ]  # fmt: skip
        return render_page(
            page, model=model, facts=facts(self.check), findings=findings, summary=count_levels(self.check)
        )

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


def run_check(config: PreviewConfig, is_strict: bool, as_json: bool, html_path: Path | None, stage: str = "") -> None:
    """Print what `check_data` finds: as a table, as JSON, or as a table and a page.

    Args:
        stage: its name goes into the JSON.

    Raises:
        DataError: there are errors, or with --strict warnings.
    """
    if html_path is not None:
        require_writable(html_path)
    result = check_data(config, watch=with_progress)
    check = result.check
    if as_json:
        print(json.dumps(({"stage": stage} if stage else {}) | result.to_json()))
    elif html_path is not None:
        write_text_atomic(html_path, result.to_html(model=config.model.path))
        print(f"written: {html_path}")
    if not as_json:
        show_check(check)
    findings = result.findings
    if check.num_errors or (is_strict and findings):
        strict = "" if check.num_errors else " (--strict: warnings count)"
        raise DataError(
            f"{count_levels(check)} in {count(check.ledger.rows, 'row')}{strict}. {_say_where(findings, as_json)}",
            code="check-findings",
        )


def _say_where(findings: list[Finding], as_json: bool) -> str:
    """Where the rows are named, and how to see one as it is trained."""
    named = [finding for finding in findings if finding.places]
    if not named:
        return "They are about the data as a whole."
    most = max(finding.count for finding in named)
    listed = max(len(finding.places) for finding in named)
    if as_json:
        where = f"The first {listed} rows of each are under rows" if most > listed else "Their rows are under rows"
    elif most > _SHOWN:
        where = f"The first {_SHOWN} rows of each are named above (--html and --json: the first {max(listed, 20)})"
    else:
        where = "Their rows are named above"
    return f"{where}; tunesmith preview --row FILE:ROW shows one as it is trained."


def count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def count_levels(check: Check) -> str:
    """ "1 error and 2 warnings"."""
    return f"{count(check.num_errors, 'error')} and {count(check.num_warnings, 'warning')}"


def short_names(check: Check) -> dict[str, str]:
    return shorten_names([*check.ledger.files, *check.eval_ledger.files])


def name_place(place: Place, names: Mapping[str, str]) -> str:
    """FILE:ROW with the end of the path that tells the file from the others."""
    return name_row(names.get(place.file, place.file), place.number)


def name_twin(place: Place, names: Mapping[str, str]) -> str:
    file, colon, number = place.twin.rpartition(":")
    return f"{names.get(file, file)}:{number}" if colon else place.twin  # data[3] has no colon


def facts(check: Check) -> list[tuple[str, str]]:
    """The numbers at the head of the report."""
    ledger = check.ledger
    share = ledger.target_tokens / ledger.tokens if ledger.tokens else 0.0
    how = ", ".join(f"{count:,} {name}" for name, count in ledger.count_how().most_common())
    samples = count(ledger.num_samples, "sample")
    tokens = f"{ledger.tokens:,} in {samples}, {share:.1%} trained, {ledger.tokens_lost:,} lost"
    lines = [
        *_file_facts([*ledger.files, *check.eval_ledger.files]),
        ("rows", f"{ledger.rows:,}: {ledger.used:,} used, {ledger.refused:,} refused, {ledger.truncated:,} truncated"),
        ("labels", how or "none"),
        ("tokens", tokens),
        ("lengths", ", ".join(f"{name} {value:,}" for name, value in check.percentiles().items()) or "none"),
        ("scripts", ", ".join(f"{name} {count:,}" for name, count in check.languages.most_common()) or "none"),
    ]
    lines += [("drawn" if number == 0 else "", line) for number, line in enumerate(check.drawn)]
    if check.eval_ledger.rows:
        eval_ledger = check.eval_ledger
        lines.append(("eval rows", f"{eval_ledger.rows:,}: {eval_ledger.used:,} used, {eval_ledger.refused:,} refused"))
    if not check.looked_for_near:
        lines.append(("not done", "near-duplicates: pip install 'tunesmith[check]'"))
    return lines


def _file_facts(files: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The files with their whole paths, which the findings shorten."""
    names = list(dict.fromkeys(files))
    for place, name in enumerate(names[:_SHOWN_FILES]):
        yield ("" if place else "file" if len(names) == 1 else "files"), name
    if len(names) > _SHOWN_FILES:
        yield "", f"and {len(names) - _SHOWN_FILES:,} more"


def show_check(check: Check) -> None:
    """Facts and findings on the terminal; each finding with what to do and its first rows."""
    stream = raw_stream(sys.stdout)
    console = Console(file=stream, width=None if Console(file=stream).is_terminal else _WIDTH, highlight=False)
    for name, value in facts(check):
        console.print(_hanging(Text(f"{name:<{_INDENT}} "), Text(one_line(value)), console.width))
    findings, names = check.findings.sorted(), short_names(check)
    if not findings:
        console.print("No problems found; every row is used.")
    for finding in findings:
        console.print()
        style = LEVEL_STYLES[finding.level]
        rows = f" ({count(finding.count, 'row')})" if finding.places else ""
        head = Text(f"{finding.level:<{_INDENT}} ", style=style)
        console.print(_hanging(head, Text(one_line(finding.what), style="bold").append(rows), console.width))
        for line in _below(finding, names, console.width - _INDENT - 1):
            console.print(_hanging(Text(" " * (_INDENT + 1)), line, console.width))


def _below(finding: Finding, names: Mapping[str, str], room: int) -> Iterator[Text]:
    """The lines below a finding: what to do, and its first rows."""
    if finding.advice:
        yield Text(one_line(finding.advice), style="italic")
    shown = finding.places[:_SHOWN]
    width = max((cell_len(_full_name(place, names)) for place in shown), default=0)
    for place in shown:
        yield from _show_place(place, names, width, room)
    if shown and finding.count > len(shown):
        yield Text(f"and {finding.count - len(shown):,} more", style="dim")


def _full_name(place: Place, names: Mapping[str, str]) -> str:
    twin = name_twin(place, names)
    return one_line(name_place(place, names) + (f" {place.sign} {twin}" if twin else ""))


def _show_place(place: Place, names: Mapping[str, str], width: int, room: int) -> Iterator[Text]:
    """FILE:ROW, never cut, and beside it or below it as much of the row as one line has room for."""
    name, start = _full_name(place, names), one_line(place.start)
    left = room - width - 2
    if not start or left >= _LEAST_START:
        yield Text(name, style="cyan").append(" " * (width - cell_len(name) + 2)).append(_cut(start, left), style="dim")
    else:
        yield Text(name, style="cyan")
        yield Text(_cut(start, room), style="dim")


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else f"{set_cell_size(text, max(1, width - 3)).rstrip()}..."


def _hanging(head: Text, text: Text, width: int) -> Text:
    """Text beside its head, its further lines below its first."""
    indent = cell_len(head.plain)
    lines = text.wrap(Console(width=width), max(1, width - indent), overflow="fold")
    for line in lines:
        line.rstrip()
    return head + Text("\n" + " " * indent).join(lines)
