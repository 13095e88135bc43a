"""report.html as text: verdict, facts, curves, data, replies and config of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from tunesmith.config.choices import ROUTER_LOSSES
from tunesmith.config.data_keys import DataSection
from tunesmith.config.plainyaml import dump
from tunesmith.config.runfile import dump_yaml, leaf_fields
from tunesmith.config.schema import DEFAULT_LORA_LR, RunConfig
from tunesmith.data.ledger import FileLedger, Ledger
from tunesmith.report.charts import Series, line_chart
from tunesmith.report.durations import format_duration, measure_durations
from tunesmith.report.during import RowReplies, read_replies
from tunesmith.report.records import RunRecords
from tunesmith.report.replies import SampleReplies, SampleReply
from tunesmith.report.sources import draw_sources, list_sources
from tunesmith.report.ticks import format_value
from tunesmith.report.verdict import Verdict
from tunesmith.sources.names import name_row
from tunesmith.use.labels import shorten_names
from tunesmith.use.pages import render_page

_CELL = 600  # characters
_ROWS = 8  # named of a cause
_DRAWN = (("system prompt added", "system_prompts_added"), ("think block removed", "empty_think_removed"))
_LEVELS = ("error", "warning", "note")


def show_run(run: RunRecords, outcome: str, verdict: Verdict, samples: SampleReplies) -> str:
    """The page as HTML.

    Args:
        outcome: how the run ended, in words.
    """
    damaged = ", ".join(map(str, run.damaged[:_ROWS])) + (" ..." if len(run.damaged) > _ROWS else "")
    return render_page(
        "report",
        title=run.folder.path.resolve().name,
        outcome=outcome,
        damaged=f"metrics.jsonl: damaged lines are left out ({damaged})" if run.damaged else "",
        summary=verdict.summary,
        findings=[(finding.what, split_keys(finding.advice)) for finding in verdict.findings],
        facts=list(list_facts(run)),
        charts=draw_charts(run),
        files=list(list_files(run.ledger)),
        sources=list(list_sources(run.ledger, run.records)),
        problems=list(list_problems(run.ledger, run.config.data)),
        remark=samples.remark,
        samples=[SampleReply(_cut(s.prompt), _cut(s.reply), _cut(s.wanted), s.has_stopped) for s in samples.replies],
        during=[_cut_row(row) for row in read_replies(run.folder.eval_replies)],
        changed=dump(changed_keys(run.config)),
        config=dump_yaml(run.config),
    )


def list_facts(run: RunRecords) -> Iterator[tuple[str, str]]:
    """Names and values for the head of the page."""
    last = next((record for record in reversed(run.records) if "loss" in record), None)
    if last is not None:
        yield "steps", f"{last['step']:,} (epoch {format_value(last.get('epoch') or 0.0, 3)})"
        if last.get("tokens") is not None:
            yield "tokens", f"{last['tokens']:,.0f}, {last.get('supervised_tokens') or 0:,.0f} of them supervised"
        if shared := describe_sharing(run.ledger.get("share_prefix")):
            yield "shared prefixes", shared
        if last.get("router_loss") is not None:
            kind = run.config.train.router_loss
            yield "router loss", f"{format_value(last['router_loss'])} ({kind}: {ROUTER_LOSSES[kind]})"
    took = measure_durations(run)
    if took.total is not None:
        phases = [("preparation", took.preparation), ("training", took.training), ("evaluation", took.evaluation)]
        phases += [("the rest (checkpoints, pauses)", took.rest)] if took.rest and took.rest >= 1 else []
        parts = [f"{name} {format_duration(seconds)}" for name, seconds in phases if seconds is not None]
        yield "took", ", ".join(parts) if len(parts) < 2 else f"{format_duration(took.total)}: {', '.join(parts)}"
    if took.tokens_per_s:
        yield "speed", f"{format_value(took.tokens_per_s)} tokens/s in training"
    _, memory = run.series("memory_gb")
    if memory:
        yield "memory", f"{format_value(max(memory))} GB at the peak of a process"


def describe_sharing(found: object) -> str:
    """What data_ledger.json has of data.share_prefix; empty in runs of earlier versions."""
    if not isinstance(found, dict):
        return ""
    if not found.get("is_on"):
        reason = found.get("reason")
        return f"not shared: {reason}" if isinstance(reason, str) and reason else ""
    ratio = found.get("ratio")
    return f"computed once: {ratio:.2f} tokens for each computed" if isinstance(ratio, int | float) else "computed once"


def draw_charts(run: RunRecords) -> list[Markup]:
    """A chart of each quantity that the run logged."""

    def series(name: str, is_marked: bool = False, is_smoothed: bool = False) -> Series:
        return Series(name, *run.series(name), is_marked, is_smoothed)

    charts = [
        line_chart("loss", [series("loss", is_smoothed=True), series("eval_loss", is_marked=True)]),
        draw_sources(run.records, "source_loss", "loss"),
        draw_sources(run.records, "eval_source_loss", "evaluation loss", is_marked=True),
        line_chart("learning rate", [series("lr")]),
        line_chart("gradient norm", [series("grad_norm", is_smoothed=True)], can_be_log=True),
        line_chart("tokens per second", [series("tokens_per_s", is_smoothed=True)]),
        line_chart("evaluation perplexity", [series("eval_perplexity", is_marked=True)], can_be_log=True),
        line_chart("evaluation token accuracy", [series("eval_token_accuracy", is_marked=True)]),
        line_chart(
            "held-out replies: exact match, ROUGE-L",
            [
                series("eval_exact_match", is_marked=True),
                series("eval_rougeL", is_marked=True),
            ],
        ),
        line_chart("held-out replies that stop", [series("eval_stopped", is_marked=True)]),
        line_chart("router loss", [series("router_loss", is_smoothed=True)]),
    ]
    return [chart for chart in charts if chart]


def list_files(ledger: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every file with its numbers of rows; those of drawn changes only where there are any."""
    every = [entry for part in ledger.values() if isinstance(part, dict) for entry in part.get("files", {}).values()]
    drawn = [(what, key) for what, key in _DRAWN if any(entry.get(key) for entry in every)]
    for name in ("train", "eval"):
        for file, entry in (ledger.get(name) or {"files": {}})["files"].items():
            refused = entry["rows"] - entry["used"]
            cut = len(entry["truncated"]) + entry.get("unlisted", {}).get("rows", {}).get("truncated", 0)
            numbers = [("rows", entry["rows"]), ("used", entry["used"]), ("refused", refused), ("truncated", cut)]
            numbers += [(what, entry.get(key, 0)) for what, key in drawn]
            yield {"part": name, "file": file, "numbers": numbers}


def list_problems(ledger: Mapping[str, Any], data: DataSection) -> Iterator[dict[str, Any]]:
    """Each cause of refusals and each note once for all files, with its count and first rows, as check has them."""
    for name in ("train", "eval"):
        part = ledger.get(name)
        if not part:
            continue
        entries = {file: _read_entry(entry) for file, entry in part["files"].items()}
        counts = part.get("replies", 0), part.get("cut_replies", 0)
        whole = Ledger(entries, codes=part.get("codes", {}), num_replies=counts[0], num_cut=counts[1])
        names = shorten_names(entries)
        problems = whole.problems(data)
        for problem in sorted(problems, key=lambda one: (_LEVELS.index(one.level), -one.count)):
            places = [(name_row(file, row), name_row(names[file], row)) for file, row in problem.rows[:_ROWS]]
            yield {
                "part": name, "level": problem.level, "what": problem.what, "count": problem.count, "places": places,
                "advice": split_keys(problem.advice),
            }  # fmt: skip


def _read_entry(entry: Mapping[str, Any]) -> FileLedger:
    return FileLedger(entry["rows"], entry["used"], refused=entry["refused"], notes=entry["notes"])


def changed_keys(config: RunConfig) -> dict[str, Any]:
    """The sections of a config with only those keys that differ from their defaults."""
    changed: dict[str, Any] = {}
    values = config.model_dump(mode="json")
    for dotted, field in leaf_fields(RunConfig).items():
        *sections, name = dotted.split(".")
        value: Any = values
        for section in sections:
            value = value[section]
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if dotted == "optim.lr" and config.lora.kind != "none":
            default = DEFAULT_LORA_LR
        default = list(default) if isinstance(default, tuple) else default
        if field.is_required() or value[name] != default:
            below = changed
            for section in sections:
                below = below.setdefault(section, {})
            below[name] = value[name]
    return changed


def split_keys(text: str) -> list[tuple[str, bool]]:
    """Pieces of an advice, and whether they are flags, which must not be broken at the end of a line."""
    pieces = re.split(r"(--[a-z_]+(?:\.[a-z_]+)*(?: \d(?:[\d.e-]*\d)?)?)", text)
    return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]


def _cut_row(row: RowReplies) -> RowReplies:
    replies = [replace(at, reply=_cut(at.reply)) for at in row.replies]
    return RowReplies(row.row, _cut(row.prompt), _cut(row.reference), replies)


def _cut(text: str) -> str:
    return text if len(text) <= _CELL else text[:_CELL] + " ..."
