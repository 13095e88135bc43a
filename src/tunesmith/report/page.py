"""report.html as text: verdict, facts, curves, data, replies and config of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from tunesmith.config.plainyaml import dump
from tunesmith.config.runfile import dump_yaml, leaf_fields
from tunesmith.config.schema import DEFAULT_LORA_LR, RunConfig
from tunesmith.report.charts import Series, line_chart
from tunesmith.report.durations import format_duration, measure_durations
from tunesmith.report.records import RunRecords
from tunesmith.report.replies import SampleReplies, SampleReply
from tunesmith.report.ticks import format_value
from tunesmith.report.verdict import Verdict
from tunesmith.use.pages import render_page

_CELL = 600  # characters
_REASONS, _ROWS = 20, 8  # of a file, of a reason


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
        remark=samples.remark,
        samples=[SampleReply(_cut(s.prompt), _cut(s.reply), _cut(s.wanted), s.has_stopped) for s in samples.replies],
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
    took = measure_durations(run)
    if took.total is not None:
        phases = [("preparation", took.preparation), ("training", took.training), ("evaluation", took.evaluation)]
        phases += [("the rest (checkpoints, pauses)", took.rest)] if took.rest and took.rest >= 1 else []
        parts = [f"{name} {format_duration(seconds)}" for name, seconds in phases if seconds is not None]
        yield "took", ", ".join(parts) if len(parts) < 2 else f"{format_duration(took.total)}: {', '.join(parts)}"
    if took.tokens_per_s:
        yield "speed", f"{format_value(took.tokens_per_s)} tokens/s in training"


def draw_charts(run: RunRecords) -> list[Markup]:
    """A chart of each quantity that the run logged."""

    def series(name: str, is_marked: bool = False, is_smoothed: bool = False) -> Series:
        return Series(name, *run.series(name), is_marked, is_smoothed)

    charts = [
        line_chart("loss", [series("loss", is_smoothed=True), series("eval_loss", is_marked=True)]),
        line_chart("learning rate", [series("lr")]),
        line_chart("gradient norm", [series("grad_norm", is_smoothed=True)], can_be_log=True),
        line_chart("tokens per second", [series("tokens_per_s", is_smoothed=True)]),
        line_chart("evaluation perplexity", [series("eval_perplexity", is_marked=True)], can_be_log=True),
        line_chart("evaluation token accuracy", [series("eval_token_accuracy", is_marked=True)]),
        line_chart("router loss", [series("router_loss", is_smoothed=True)]),
    ]
    return [chart for chart in charts if chart]


def list_files(ledger: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every file with its numbers of rows, and each reason why rows were left out."""
    for name in ("train", "eval"):
        part = ledger.get(name)
        for file, entry in (part or {"files": {}})["files"].items():
            reasons = [f"refused: {text}" for text in list_reasons(entry["refused"])]
            reasons += [f"truncated: {len(entry['truncated']):,}"] if entry["truncated"] else []
            reasons += [f"{note}: {len(numbers):,}" for note, numbers in entry["notes"].items()]
            refused = sum(len(numbers) for numbers in entry["refused"].values())
            more = [f"and {len(reasons) - _REASONS} more"] if len(reasons) > _REASONS else []
            numbers = [("rows", entry["rows"]), ("used", entry["used"]), ("refused", refused)]
            yield {"part": name, "file": file, "numbers": numbers, "remarks": "\n".join(reasons[:_REASONS] + more)}


def list_reasons(refused: Mapping[str, list[int]]) -> Iterator[str]:
    """Each reason with its rows, most frequent first; reasons that differ in their numbers alone are one."""
    kinds: dict[str, list[tuple[str, list[int]]]] = {}
    for reason, numbers in refused.items():
        kinds.setdefault(re.sub(r"\d+", "0", reason), []).append((reason, numbers))
    for found in sorted(kinds.values(), key=lambda found: -sum(len(numbers) for _, numbers in found)):
        numbers = sorted(number for _, numbers in found for number in numbers)
        others = " (or another number)" if len(found) > 1 else ""
        yield f"{found[0][0]}{others}: {len(numbers):,} row{'s' if len(numbers) != 1 else ''} ({_some(numbers)})"


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


def _cut(text: str) -> str:
    return text if len(text) <= _CELL else text[:_CELL] + " ..."


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:_ROWS])) + (" ..." if len(numbers) > _ROWS else "")
