"""Whether a sample is right, and how good it is: by the scores of `tunesmith evaluate`, and a few conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.distillation.questions import Question
from tunesmith.distillation.samples import Sample
from tunesmith.distillation.settings import Check, Selection
from tunesmith.evaluation.calls import matches_schema
from tunesmith.evaluation.forms import INVALID, load_json
from tunesmith.evaluation.records import SCORES, ReplyRecord
from tunesmith.evaluation.replies import Asked, ReplyScorer, answer_of
from tunesmith.generation.matching import final_number
from tunesmith.generation.reply_parts import ReplyParts

_PATTERN_S = 1.0  # a pattern may take exponential time
_BY_KIND = {"tool_call": "tool_equal", "json": "json_equal", "text": "exact_match"}  # the check `reference`
_BESIDE_REFERENCE = ("text", "json", "tools")
_NOT_KEPT = ("stopped", "reply_tokens", "distinct_1", "distinct_2")  # scores that a row's metadata says otherwise
NO_REFERENCE = "the row has no reference to check it by"


@dataclass(frozen=True, slots=True)
class Scored:
    """A sample with its scores.

    Attributes:
        parts: its reasoning, content and tool calls.
        scores: by the names of `tunesmith evaluate`; without a reference, only those of its form.
    """

    sample: Sample
    parts: ReplyParts
    answer: str
    kind: str
    reference: str | None
    scores: Mapping[str, float]

    def shown_scores(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in self.scores.items() if name not in _NOT_KEPT}


def score_sample(scorer: ReplyScorer, question: Question, sample: Sample, reference: str | None) -> Scored:
    """Args:
    reference: the row's own reply as training renders it, without its stop token; None where there is none.
    """
    tools = tuple(question.row.get("tools", ()))
    has_calls = bool(tools) or any("tool_calls" in turn for turn in question.row["messages"])
    has_calls = has_calls or bool(question.reference and "tool_calls" in question.reference)
    has_stopped = sample.finish_reason == "stop"
    asked = Asked(0, question.where, question.turn, (), reference or "", 0, tools, has_calls, 0)
    record = ReplyRecord(
        "", question.where, question.turn, "text", "", sample.text, reference or "", has_stopped, sample.tokens, 0
    )
    scored = scorer.score(record, asked)
    scores = dict(scored.scores)
    if reference is None:
        scores = {name: value for name, value in scores.items() if SCORES[name].group not in _BESIDE_REFERENCE}
    parts = scorer.form.parse(sample.text, has_calls, tools)
    return Scored(sample, parts, answer_of(sample.text, parts), scored.kind, reference, scores)


def find_fault(scored: Scored, checks: Sequence[Check]) -> str | None:
    """Why a sample does not pass the checks; None if it does."""
    for check in checks:
        try:
            verdict = _passes(scored, check)
        except TimeoutError:
            return f"the check {check.text} does not end"
        if verdict is None:
            return NO_REFERENCE if scored.reference is None else f"the check {check.text} does not apply to the row"
        if not verdict:
            return f"fails the check {check.text}"
    return None


def _passes(scored: Scored, check: Check) -> bool | None:
    """None where the check does not apply.

    Raises:
        TimeoutError: it takes too long, or the schema refers to itself without end or to another document.
    """
    if check.name == "regex":
        return check.pattern.search(scored.answer, timeout=_PATTERN_S) is not None
    if check.name == "json_schema":
        value = load_json(scored.parts.content)
        if value is INVALID:
            return False
        if (is_match := matches_schema(value, check.schema)) is None:
            raise TimeoutError
        return is_match
    if check.name == "number":
        wanted = final_number(scored.reference) if scored.reference is not None else None
        return None if wanted is None else final_number(scored.answer) == wanted
    name = _BY_KIND[scored.kind] if check.name == "reference" else check.name
    value = scored.scores.get(name)
    if value is None:
        return None
    return value == (0.0 if SCORES[name].better == "lower" else 1.0)


def rank(scored: Scored, selection: Selection) -> float:
    """The larger, the better; 0 where samples are not ranked."""
    name = selection.score
    if name is None:
        if selection.keep != "best":
            return 0.0
        name = "rougeL" if scored.reference is not None else "logprob"
    if name == "logprob":
        return scored.sample.logprob if scored.sample.logprob is not None else float("-inf")
    value = scored.scores.get(name)
    if value is None:
        return float("-inf")
    return -value if SCORES[name].better == "lower" else value
