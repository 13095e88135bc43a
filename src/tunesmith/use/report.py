"""RUN/report.html: one self-contained page of what a run did, finished or not."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config.runfile import read_yaml
from tunesmith.config.schema import ModelSection, RunConfig
from tunesmith.data.labels import Sample
from tunesmith.data.split import split_eval
from tunesmith.data.store import open_store
from tunesmith.display import to_html
from tunesmith.errors import InterruptedRun, ModelError, RunError
from tunesmith.files import write_text_atomic
from tunesmith.model.load import count_parameters
from tunesmith.model.source import telling_text
from tunesmith.reading import read_text
from tunesmith.runfolder import RunFolder, read_metrics
from tunesmith.use.batch import Sampling
from tunesmith.use.charts import CHART_CSS, Series, line_chart
from tunesmith.use.generate import Speaker, decode_reply, load_speaker, reply_to

logger = logging.getLogger(__name__)
NUM_SAMPLES = 5
_REPLY_TOKENS = 96
_CELL = 600  # characters
_TEXT_PROMPT_TOKENS = 24  # of raw text there is no question; its beginning is continued
_LARGEST_ON_CPU = 300_000_000  # parameters; beyond that, sample replies would take longer than people wait


@dataclass(frozen=True, slots=True)
class SampleReply:
    prompt: str
    reply: str
    wanted: str


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
    page = render_page(run, outcome, records, ledger, samples, remark)
    write_text_atomic(folder.report, page)
    return folder.report


def sample_replies(run: Path, config: RunConfig) -> tuple[list[SampleReply], str]:
    """Replies to prompts of held-out rows where there are any, else of training rows; and where they come from."""
    folder = RunFolder(run)
    if not folder.has_complete_model:
        return [], "none: the run left no finished model"
    speaker = load_speaker(ModelSection(path=str(run), trust_remote_code=config.model.trust_remote_code))
    device = next(speaker.model.parameters()).device
    if device.type == "cpu" and count_parameters(speaker.model)[0] > _LARGEST_ON_CPU:
        return [], "none: the model is too large to answer quickly on this CPU"
    has_eval = folder.eval_tokens.is_dir()
    store = open_store(folder.eval_tokens if has_eval else folder.tokens)
    _, held_out = split_eval(store, 0.0 if has_eval else config.data.eval_split, config.train.seed)
    ids = list(range(len(store))) if has_eval or not len(held_out) else held_out.tolist()
    step = max(1, len(ids) // NUM_SAMPLES)
    remark = "greedy replies to held-out rows" if has_eval or len(held_out) else "greedy replies to training rows"
    samples = [store[index] for index in ids[::step][:NUM_SAMPLES]]
    try:
        return _reply_to_all(speaker, samples), remark
    except ModelError as error:
        return [], f"none: {error}"


def _reply_to_all(speaker: Speaker, samples: Sequence[Sample]) -> list[SampleReply]:
    """Replies to the prompt of each sample's first reply, or to the beginning of a raw text."""
    asked, wanted = [], []
    for sample in samples:
        ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
        start = mask.index(1) if 1 in mask else len(ids)
        end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
        if start == 0:  # raw text
            start = min(_TEXT_PROMPT_TOKENS, len(ids) // 2)
            end = min(end, start + _REPLY_TOKENS)
        asked.append(ids[:start] or ids[:1])
        wanted.append(decode_reply(speaker.encoder, ids[start:end]))
    replies = reply_to(speaker, asked, Sampling(_REPLY_TOKENS, temperature=0))
    prompts = [speaker.encoder.tokenizer.decode(ids) for ids in asked]
    return [SampleReply(*row) for row in zip(prompts, [reply.text for reply in replies], wanted, strict=True)]


def draw_charts(records: list[dict[str, Any]]) -> str:
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
    return "\n".join(chart for chart in charts if chart)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ --ink: #1b1f24; --paper: #fff; --muted: #57606a; --line: #d8dee4; --one: #0b62c4; --two: #c2410c }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6edf3; --paper: #0d1117; --muted: #8b949e; --line: #30363d;
  --one: #58a6ff; --two: #f0883e }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper) }}
h1 {{ font-size: 1.4rem; margin-bottom: 0 }} h2 {{ font-size: 1.05rem; margin-top: 2rem }}
.muted, figcaption span {{ color: var(--muted) }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem }}
figure {{ margin: 0 }} table {{ border-collapse: collapse; width: 100% }} table.even {{ table-layout: fixed }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere }}
td:first-child {{ min-width: 3rem }} .n {{ text-align: right; white-space: nowrap }}
pre {{ border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto; font-size: 13px }}
{chart_css}</style></head><body>
<h1>{title}</h1><p class="muted">{summary}</p>
<div class="charts">{charts}</div>
<h2>Data</h2>{ledger}
<h2>Sample replies</h2><p class="muted">{remark}</p>{samples}
<h2>Config</h2><pre>{config}</pre>
</body></html>
"""


def render_page(
    run: Path,
    outcome: str,
    records: list[dict[str, Any]],
    ledger: dict[str, Any],
    samples: list[SampleReply],
    remark: str,
) -> str:
    """The page; every text that comes from data is escaped."""
    last = next((r for r in reversed(records) if "loss" in r), None)
    summary = to_html(outcome)
    if last:
        summary += (
            f"; step {last['step']:,}, {last['epoch']:.2f} epochs, {last['supervised_tokens']:,} supervised tokens"
        )
    rows = "".join(
        "<tr>" + "".join(f"<td>{to_html(_cut(text))}</td>" for text in (s.prompt, s.reply, s.wanted)) + "</tr>"
        for s in samples
    )
    head = "<tr><th>prompt, as the model gets it</th><th>its reply</th><th>in the data</th></tr>"
    return _PAGE.format(
        title=to_html(run.resolve().name),
        chart_css=CHART_CSS,
        summary=summary,
        charts=draw_charts(records) or "<p>No step was logged.</p>",
        ledger=_ledger_table(ledger),
        remark=to_html(remark),
        samples=f'<table class="even">{head}{rows}</table>' if rows else "",
        config=to_html(read_text(RunFolder(run).config)),
    )


def _ledger_table(ledger: dict[str, Any]) -> str:
    """Every file with its rows, and each reason why rows were left out."""
    rows = []
    for name in ("train", "eval"):
        part = ledger.get(name)
        for file, entry in (part or {"files": {}})["files"].items():
            reasons = [f"{reason} (rows {_some(numbers)})" for reason, numbers in entry["refused"].items()]
            reasons += [f"truncated: {len(entry['truncated'])}"] if entry["truncated"] else []
            reasons += [f"{note}: {len(numbers)}" for note, numbers in entry["notes"].items()]
            refused = sum(len(numbers) for numbers in entry["refused"].values())
            rows.append(
                f'<tr><td>{name}</td><td>{to_html(file)}</td><td class="n">{entry["rows"]:,}</td>'
                f'<td class="n">{entry["used"]:,}</td><td class="n">{refused:,}</td>'
                f"<td>{to_html(chr(10).join(reasons[:20]))}</td></tr>"
            )
    numbers = "".join(f'<th class="n">{name}</th>' for name in ("rows", "used", "refused"))
    head = f"<tr><th></th><th>file</th>{numbers}<th>why, and notes</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


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
