"""Write RUN/report.html: one self-contained page about a run, finished or not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith.errors import InterruptedRun, RunError
from tunesmith.files import write_text_atomic
from tunesmith.report.page import show_run
from tunesmith.report.records import RunRecords, read_run
from tunesmith.report.replies import SampleReplies, keep_replies, kept_replies, sample_replies
from tunesmith.report.verdict import Verdict, judge

logger = logging.getLogger(__name__)


def write_report(run: Path, outcome: str = "") -> Path:
    """Write the page from what the run left on disk; sample replies where it left a model.

    Args:
        outcome: how the run ended, in words; empty: what the folder tells.

    Raises:
        TunesmithError: the folder is not a run, or what it holds is damaged.
    """
    path, _ = _write(run, outcome)
    return path


def read_verdict(run: Path) -> Verdict:
    """The verdict on a run, with the sample replies of its last report.

    Raises:
        TunesmithError: as for the report.
    """
    found = read_run(run)
    return judge(found, kept_replies(found.folder, found.last_step))


def _write(run: Path, outcome: str) -> tuple[Path, Verdict]:
    found = read_run(run)
    samples = sample_replies(found.folder.path, found.config)
    verdict = judge(found, samples if is_of_last_step(found) else SampleReplies("none"))
    page = show_run(found, outcome or describe_outcome(found), verdict, samples)
    write_text_atomic(found.folder.report, page)
    if is_of_last_step(found):
        with suppress(OSError):  # only the verdict in Python loses them
            keep_replies(found.folder, found.last_step, samples)
    return found.folder.report, verdict


def is_of_last_step(run: RunRecords) -> bool:
    """Whether the model in the folder is that of the last logged step."""
    return run.folder.has_complete_model and run.run.get("finished_at_step") in (None, run.last_step)


def describe_outcome(run: RunRecords) -> str:
    """How far the run is, by its folder."""
    if is_of_last_step(run):
        return "finished"
    finished = run.run.get("finished_at_step")
    if finished is not None and run.folder.has_complete_model:
        return f"finished at step {finished:,}; training longer, at step {run.last_step:,}"
    return f"not finished: at step {run.last_step:,}" if run.records else "not finished: no step was logged"


def _finish_quietly(run: Path, outcome: str, note: Callable[[str], None] | None = None) -> None:
    """For the end of a run: a page that cannot be written must not hide how the run itself went.

    Args:
        note: shows the verdict.
    """
    from tunesmith.model.source import telling_text

    try:
        path, verdict = _write(run, outcome)
    except Exception as error:
        logger.info("report.html could not be written: %s", telling_text(error))
        return
    if note is not None:
        note("\n".join(verdict.lines()))
    logger.info("report: %s", path)


@contextmanager
def reported(run: Path, note: Callable[[str], None] | None = None) -> Iterator[None]:
    """Leave report.html in the run's folder, however the block that trains it ends, and show the verdict.

    Args:
        note: of the reporter that shows the run; None shows no verdict.
    """
    run = run.expanduser()
    try:
        yield
    except (RunError, InterruptedRun) as error:
        with suppress(KeyboardInterrupt):  # how the run ended is raised all the same
            if error.code == "interrupted-finished":
                _finish_quietly(run, "finished", note)
            elif (run / "config.yaml").is_file():
                _finish_quietly(run, f"not finished: {error}")
        raise
    try:
        _finish_quietly(run, "finished", note)
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted while report.html was written; {run} is finished, without a report",
            code="interrupted-report",
        ) from None
