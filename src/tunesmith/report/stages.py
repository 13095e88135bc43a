"""RUN/report.html of a run with stages: what became of each stage, with a link to its report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tunesmith.errors import TunesmithError
from tunesmith.files import read_sealed, write_text_atomic
from tunesmith.report.page import list_facts
from tunesmith.report.records import read_run
from tunesmith.report.replies import kept_replies
from tunesmith.report.ticks import format_value
from tunesmith.report.verdict import judge
from tunesmith.report.write import describe_outcome, write_report
from tunesmith.runfolder import STAGES_FILE, RunFolder, has_stages, name_stage, started_stages
from tunesmith.use.pages import render_page

logger = logging.getLogger(__name__)


def report_run(run: Path) -> Path:
    """Write the report of a run; of one with stages, that of each stage that has begun, and the page with links.

    Raises:
        TunesmithError: the folder is not a run, or what it holds is damaged.
    """
    path = run.expanduser()
    if not has_stages(path):
        return write_report(run)
    for stage in started_stages(path):
        write_report(stage.path)
    return write_index(path)


def write_index(path: Path) -> Path:
    """Write the page of a run with stages from what its stages left.

    Raises:
        TunesmithError: stages.json is damaged.
    """
    names = _read_names(path)
    stages = [_describe(RunFolder(path / name_stage(number, name)), name) for number, name in enumerate(names, 1)]
    finished = sum(stage["is_finished"] for stage in stages)
    outcome = "finished" if finished == len(names) else f"not finished: {finished} of {len(names)} stages"
    page = render_page("stages", title=path.resolve().name, outcome=outcome, stages=stages)
    index = RunFolder(path).report
    write_text_atomic(index, page)
    return index


def write_index_quietly(path: Path) -> None:
    """For the end of a run: a page that cannot be written must not hide how the run itself went."""
    try:
        if started_stages(path):
            write_index(path)
    except Exception as error:
        logger.info("report.html could not be written: %s", error)


def _read_names(path: Path) -> list[str]:
    file = path / STAGES_FILE
    try:
        return [str(stage["name"]) for stage in read_sealed(file)["stages"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TunesmithError(
            f"{file}: cannot be read ({error}), and it names the stages. Restore it from a backup.",
            code="run-file-damaged",
        ) from None


def _describe(folder: RunFolder, name: str) -> dict[str, Any]:
    """A stage for the page; one that has not begun, or whose files are damaged, by its outcome alone."""
    shown: dict[str, Any] = {"name": name, "page": "", "outcome": "not begun", "summary": "", "findings": [],
                             "facts": [], "is_finished": False}  # fmt: skip
    if not folder.config.is_file():
        return shown
    try:
        run = read_run(folder.path)
    except TunesmithError as error:
        return shown | {"outcome": f"damaged: {error}"}
    verdict = judge(run, kept_replies(folder, run.last_step))
    outcome = describe_outcome(run)
    return shown | {
        "page": quote(f"{folder.path.name}/{folder.report.name}") if folder.report.is_file() else "",
        "outcome": outcome,
        "summary": verdict.summary,
        "findings": [finding.what for finding in verdict.findings],
        "facts": [*_list_losses(run.records), *list_facts(run)],
        "is_finished": outcome == "finished",
    }


def _list_losses(records: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for name in ("loss", "eval_loss"):
        values = [record[name] for record in records if record.get(name) is not None]
        if len(values) > 1:
            yield name, f"{format_value(values[0])} to {format_value(values[-1])}"
        elif values:
            yield name, format_value(values[0])
