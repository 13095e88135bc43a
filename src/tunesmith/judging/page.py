"""evaluate.html: scores, differences, and the replies of all models beside their references, worst first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tunesmith.data.scripts import script_of
from tunesmith.evaluation.records import (
    SCORES,
    Difference,
    Evaluation,
    EvaluationFolder,
    ReplyRecord,
    Score,
    read_replies,
)
from tunesmith.files import write_text_atomic
from tunesmith.judging.run import Judgement, JudgementLog
from tunesmith.judging.tally import REFERENCE, show_share
from tunesmith.use.pages import render_page

MAX_ROWS = 2000
"""Replies of each model on the page, the worst; replies.jsonl has all."""
_TEXT, _PROMPT = 3000, 2000  # characters of a text
_GROUPS = {"likelihood": "Likelihood", "text": "Replies beside the references", "form": "Form of the replies",
           "json": "Replies that should be JSON", "tools": "Tool calls", "judge": "Judge"}  # fmt: skip
KINDS = {
    "wrong": "not an exact match",
    "right": "exact match",
    "endless": "does not stop",
    "loops": "repeats itself",
    "empty": "empty",
    "broken-json": "broken JSON",
    "tool-calls": "tool calls",
    "wrong-call": "wrong tool call",
    "no-reply": "no room for a reply",
    "differs": "models differ",
    "judge-split": "judge: orders disagree",
    "judge-none": "judge: no verdict",
}
"""What a row can be filtered by -> its words."""
_SHOWN_SCORES = ("exact_match", "rougeL", "chrf")  # beside a reply


@dataclass(frozen=True, slots=True)
class Cell:
    """A score in a table, or a difference; `tone` is good or bad where its interval says so."""

    value: str
    interval: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's reply to a row."""

    model: str
    text: str
    kinds: Sequence[str]
    scores: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row with the replies of all models.

    Attributes:
        kinds: of all its replies together.
        verdicts: the judge's answers: who stood first, who second, the verdict, the answer.
    """

    name: str
    place: int
    script: str
    prompt: str
    reference: str
    replies: Sequence[Reply]
    kinds: Sequence[str]
    verdicts: Sequence[tuple[str, str, str, str]]


def write_page(folder: EvaluationFolder, evaluation: Evaluation) -> None:
    """Write evaluate.html from evaluate.json, replies.jsonl and judge.jsonl.

    Raises:
        TunesmithError: replies.jsonl is missing or damaged.
    """
    records = list(read_replies(folder)) if folder.replies.exists() else []
    judgements = list(JudgementLog(folder.judgements).done.values()) if evaluation.judge else []
    write_text_atomic(folder.page, show_evaluation(evaluation, records, judgements))


def show_evaluation(
    evaluation: Evaluation, records: Sequence[ReplyRecord], judgements: Sequence[Judgement] = ()
) -> str:
    """The page as HTML."""
    every = sort_rows(evaluation, records)
    answers: dict[tuple[str, int], list[Judgement]] = {}
    for judgement in judgements:
        if evaluation.judge and judgement.judge == evaluation.judge["model"]:
            answers.setdefault((judgement.row, judgement.turn), []).append(judgement)
    names = [model.name for model in evaluation.models]
    rows = [_row(place, key, found, names, answers.get(key, [])) for place, key, found in every[:MAX_ROWS]]
    data = evaluation.data
    return render_page(
        "evaluate",
        title=" / ".join(names),
        version=evaluation.tunesmith,
        facts=list(_facts(evaluation)),
        remarks=[(model.name, remark) for model in evaluation.models for remark in model.remarks],
        refused=[(refusal.count, refusal.reason, refusal.rows) for refusal in data.refused],
        names=names,
        pairs=[(pair.model, pair.reference) for pair in evaluation.differences],
        groups=list(_groups(evaluation)),
        methods=list(evaluation.methods.items()),
        judge=_judge(evaluation.judge) if evaluation.judge else None,
        rows=rows,
        left_out=max(0, len(every) - MAX_ROWS),
        kinds=[(kind, words) for kind, words in KINDS.items() if any(kind in row.kinds for row in rows)],
        scripts=sorted({row.script for row in rows}),
        words=KINDS,
    )


def _facts(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    data, settings = evaluation.data, evaluation.settings
    sources = ", ".join(data.sources[:3]) + (f" and {len(data.sources) - 3} more" if len(data.sources) > 3 else "")
    yield "data", sources
    yield "rows", f"{data.rows:,} read, {data.scored:,} scored, {data.replies:,} replies of each model"
    for model in evaluation.models:
        what = f"{model.path}, the base of {model.base_of}" if model.base_of else model.path
        yield model.name, f"{what}; template {model.template}" if model.template != "none" else what
    temperature = settings.get("temperature")
    how = "greedy" if temperature == 0 else "as the models say" if temperature is None else f"temperature {temperature}"
    yield "sampling", f"{how}, at most {settings.get('max_new_tokens')} tokens, seed {settings.get('seed')}"


def _groups(evaluation: Evaluation) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Groups of scores, each a list of lines with a cell for each model and each difference."""
    names = [name for name in SCORES if any(name in model.scores for model in evaluation.models)]
    for group, members in groupby(names, key=lambda name: SCORES[name].group):
        lines = []
        for name in members:
            kind = SCORES[name]
            cells = [_cell(name, model.scores.get(name)) for model in evaluation.models]
            better = f", {kind.better} is better" if kind.better else ""
            differences = [_difference(name, pair) for pair in evaluation.differences]
            about = f"{kind.about}{better}"
            lines.append({"label": kind.label, "about": about, "cells": cells, "differences": differences})
        yield _GROUPS.get(group, group), lines


def _cell(name: str, score: Score | None) -> Cell:
    if score is None or score.value is None:
        return Cell("-")
    kind = SCORES[name]
    return Cell(kind.show(score.value), _interval(name, score))


def _interval(name: str, score: Score, sign: str = "") -> str:
    if score.low is None or score.high is None:
        return ""
    kind = SCORES[name]
    return f"{kind.show(score.low, sign)} to {kind.show(score.high, sign)}"


def _difference(name: str, pair: Difference) -> Cell:
    score = pair.scores.get(name)
    if score is None or score.value is None:
        return Cell("-")
    kind, tone = SCORES[name], ""
    if kind.better and score.low is not None and score.high is not None and (score.low > 0 or score.high < 0):
        tone = "good" if (score.low > 0) == (kind.better == "higher") else "bad"
    return Cell(kind.show(score.value, "+"), _interval(name, score, "+"), tone)


Found = Mapping[str, ReplyRecord]
Key = tuple[str, int]


def sort_rows(evaluation: Evaluation, records: Sequence[ReplyRecord]) -> list[tuple[int, Key, Found]]:
    """Place in the data, key, and replies by model, of each row; worst first.

    Worst: by exact match, then ROUGE-L, then chrF, of the first model that is no base.
    """
    found: dict[Key, dict[str, ReplyRecord]] = {}
    for record in records:
        found.setdefault((record.row, record.turn), {})[record.model] = record
    first = next((model.name for model in evaluation.models if model.base_of is None), "")
    every = [(place, key, by_model) for place, (key, by_model) in enumerate(found.items())]
    return sorted(every, key=lambda one: (_goodness(one[2].get(first)), one[0]))


def _goodness(record: ReplyRecord | None) -> tuple[float, ...]:
    if record is None or record.error:
        return (-1.0,)
    return tuple(record.scores.get(name, 0.0) for name in ("exact_match", "rougeL", "chrf"))


def kinds_of(record: ReplyRecord) -> list[str]:
    """What a reply can be filtered by, as in KINDS."""
    if record.error:
        return ["no-reply", "wrong"]
    scores = record.scores
    has_call = any(scores.get(name, 1.0) < 1 for name in ("tool_name", "tool_arguments", "tool_equal", "tool_choice"))
    is_right = scores.get("tool_equal", scores.get("json_equal", scores.get("exact_match", 0.0))) >= 1
    is_kind = {
        "wrong": not is_right,
        "right": is_right,
        "endless": not record.has_stopped,
        "loops": scores.get("loops", 0.0) > 0,
        "empty": not record.reply.strip(),
        "broken-json": scores.get("json_valid", 1.0) < 1,
        "tool-calls": record.kind == "tool_call" or record.has_tools,
        "wrong-call": has_call,
    }
    return [kind for kind, holds in is_kind.items() if holds]


def _row(place: int, key: Key, found: Found, names: Sequence[str], answers: Sequence[Judgement]) -> Row:
    records = [found[name] for name in names if name in found]
    replies = [Reply(one.model, _cut(one.reply, _TEXT), kinds_of(one), _scores_of(one)) for one in records]
    kinds = dict.fromkeys(kind for reply in replies for kind in reply.kinds)
    if len({one.reply for one in records}) > 1:
        kinds["differs"] = None
    by_pair: dict[frozenset[str], set[str]] = {}
    for one in answers:
        winner = {"first": one.first, "second": one.second, "tie": "tie", None: ""}[one.verdict]
        by_pair.setdefault(frozenset((one.first, one.second)), set()).add(winner)
        if one.verdict is None:
            kinds["judge-none"] = None
    if any(len(winners - {""}) > 1 for winners in by_pair.values()):
        kinds["judge-split"] = None
    row, turn = key
    name = row.rpartition("/")[2] + (f", reply {turn + 1}" if turn else "")
    prompt, reference = records[0].prompt, records[0].reference
    verdicts = [(one.first, one.second, _winner(one), _cut(one.answer or one.problem, _TEXT)) for one in answers]
    script = script_of(reference.replace("\n", " "))
    return Row(name, place, script, _cut_start(prompt, _PROMPT), _cut(reference, _TEXT), replies, list(kinds), verdicts)


def _winner(one: Judgement) -> str:
    winner = {"first": one.first, "second": one.second, "tie": "a tie", None: "no verdict"}[one.verdict]
    return "the reference" if winner == REFERENCE else winner


def _scores_of(record: ReplyRecord) -> str:
    parts = [
        f"{SCORES[name].label} {SCORES[name].show(record.scores[name])}"
        for name in _SHOWN_SCORES
        if name in record.scores
    ]
    return ", ".join([*parts, f"{record.tokens:,} tokens"])


def _judge(judge: Mapping[str, Any]) -> dict[str, Any]:
    lines = [
        {
            "pair": f"{one['model']} against {one['reference']}",
            "win_rate": show_share(one["win_rate"]),
            "first_place": show_share(one["first_place"]),
            **{name: one[name] for name in ("wins", "losses", "ties", "split", "without_verdict", "judged", "equal")},
        }
        for one in judge["comparisons"]
    ]
    return {"model": judge["model"], "url": judge["url"], "method": judge["method"], "lines": lines}


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} [... {len(text) - length:,} more characters]"


def _cut_start(text: str, length: int) -> str:
    """The end of a prompt: the last question is there."""
    return text if len(text) <= length else f"[{len(text) - length:,} characters before ...] {text[-length:]}"
