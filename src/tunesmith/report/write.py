"""Write RUN/report.html: one self-contained page about a run, finished or not."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tunesmith.config.runfile import read_yaml
from tunesmith.config.schema import RunConfig
from tunesmith.errors import InterruptedRun, RunError
from tunesmith.files import write_text_atomic
from tunesmith.model.source import telling_text
from tunesmith.reading import read_text
from tunesmith.report.charts import Series, line_chart
from tunesmith.report.replies import SampleReply, sample_replies
from tunesmith.runfolder import RunFolder, read_metrics
from tunesmith.use.pages import render_page

logger = logging.getLogger(__name__)
_CELL = 600  # characters


def write_report(run: Path, outcome: str = "finished") -> Path:
    """Write the page from what the run left on disk; sample replies where it left a model.

    Args:
        outcome: how the run ended, in words, for the head of the page.
    """
    folder = RunFolder(run)
    config = read_yaml(folder.config)
    records = read_metrics(folder.metrics)
    ledger = json.loads(read_text(folder.ledger))
    samples, remark = sample_replies(run, RunConfig.model_validate(config))
    page = show_run(run, outcome, records, ledger, samples, remark)
    write_text_atomic(folder.report, page)
    return folder.report


def draw_charts(records: Sequence[dict[str, Any]]) -> list[Markup]:
    """A chart of each quantity that the run logged."""

    def series(name: str) -> Series:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        return Series(name, [x for x, _ in points], [y for _, y in points])

    charts = [
        line_chart("loss", [series("loss"), series("eval_loss")]),
        line_chart("learning rate", [series("lr")]),
        line_chart("throughput, tokens a second", [series("tokens_per_s")]),
        line_chart("gradient norm", [series("grad_norm")]),
        line_chart("evaluation perplexity", [series("eval_perplexity")]),
        line_chart("evaluation token accuracy", [series("eval_token_accuracy")]),
        line_chart("router loss", [series("router_loss")]),
    ]
    return [chart for chart in charts if chart]


def show_run(
    run: Path,
    outcome: str,
    records: Sequence[dict[str, Any]],
    ledger: dict[str, Any],
    samples: Sequence[SampleReply],
    remark: str,
) -> str:
    """The page as HTML."""
    last = next((r for r in reversed(records) if "loss" in r), None)
    summary = outcome
    if last:
        summary += (
            f"; step {last['step']:,}, {last['epoch']:.2f} epochs, {last['supervised_tokens']:,} supervised tokens"
        )
    return render_page(
        "report",
        title=run.resolve().name,
        summary=summary,
        charts=draw_charts(records),
        files=list(_list_files(ledger)),
        remark=remark,
        samples=[SampleReply(_cut(s.prompt), _cut(s.reply), _cut(s.wanted)) for s in samples],
        config=read_text(RunFolder(run).config),
    )


def _list_files(ledger: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every file with its numbers of rows, and each reason why rows were left out."""
    for name in ("train", "eval"):
        part = ledger.get(name)
        for file, entry in (part or {"files": {}})["files"].items():
            reasons = [f"{reason} (rows {_some(numbers)})" for reason, numbers in entry["refused"].items()]
            reasons += [f"truncated: {len(entry['truncated'])}"] if entry["truncated"] else []
            reasons += [f"{note}: {len(numbers)}" for note, numbers in entry["notes"].items()]
            refused = sum(len(numbers) for numbers in entry["refused"].values())
            numbers = (entry["rows"], entry["used"], refused)
            yield {"part": name, "file": file, "numbers": numbers, "remarks": "\n".join(reasons[:20])}


def _cut(text: str) -> str:
    return text if len(text) <= _CELL else text[:_CELL] + " ..."


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")


def write_report_quietly(run: Path, outcome: str) -> None:
    """For the end of a run: a page that cannot be written must not hide how the run itself went."""
    if not RunFolder(run).config.is_file():
        return
    try:
        logger.info("report: %s", write_report(run, outcome))
    except Exception as error:
        logger.info("report.html could not be written: %s", telling_text(error))


@contextmanager
def reported(run: Path) -> Iterator[None]:
    """Leaves report.html in the run's folder, however the block that trains it ends."""
    run = run.expanduser()
    try:
        yield
    except (RunError, InterruptedRun) as error:
        with suppress(KeyboardInterrupt):  # how the run ended is raised all the same
            write_report_quietly(run, f"not finished: {error}")
        raise
    try:
        write_report_quietly(run, "finished")
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted while report.html was written; {run} is finished, without a report",
            code="interrupted-report",
        ) from None
