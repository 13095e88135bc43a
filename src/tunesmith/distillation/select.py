"""Choose which samples become rows: those that end, pass the checks and can be trained on, without repetitions."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.config.data_keys import DataSection
from tunesmith.data.ledger import LabelledRow
from tunesmith.distillation.checks import Scored, find_fault, rank, score_sample
from tunesmith.distillation.prompts import Prompts, RowLabeller, begin_of_reply
from tunesmith.distillation.questions import Question, Row, answer_message
from tunesmith.distillation.samples import Sample, SampleLog
from tunesmith.distillation.settings import GenerateSettings
from tunesmith.evaluation.replies import ReplyScorer
from tunesmith.evaluation.texts import TextScorer
from tunesmith.generation.decode import decode_reply
from tunesmith.generation.reply_parts import reply_format
from tunesmith.sources.read import RawRow

_TOGETHER = 64  # questions whose samples are labelled at once
_NAMED = 20  # samples that the ledger names for each reason
CUT = "cut off before its end (max_new_tokens or the context)"
EMPTY = "is empty"
BROKEN = "has bytes that are not text (U+FFFD)"
CONTROL = "writes a control token in its text"
OTHER_PROMPT = "the template changes the prompt once it is answered so"
REPEATED = "repeats another sample of the same prompt"
NOT_BEST = "others of the row come first (keep_per_row)"


@dataclass(slots=True)
class LeftOut:
    """Samples that were left out for one reason.

    Attributes:
        samples: the first of them, as FILE:ROW#SAMPLE.
    """

    count: int = 0
    samples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """What became of the samples.

    Attributes:
        answered: questions of which a sample was kept.
        tokens: of all samples, and of those kept.
    """

    questions: int = 0
    answered: int = 0
    samples: int = 0
    kept: int = 0
    tokens: int = 0
    kept_tokens: int = 0
    left_out: dict[str, LeftOut] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        reasons = sorted(self.left_out.items(), key=lambda item: (-item[1].count, item[0]))
        return {
            "questions": self.questions,
            "answered": self.answered,
            "samples": self.samples,
            "kept": self.kept,
            "left_out": {reason: {"count": one.count, "samples": one.samples} for reason, one in reasons},
            "tokens": self.tokens,
            "kept_tokens": self.kept_tokens,
        }


@dataclass(slots=True)
class Outcome:
    """A sample as a row of the output or of the rejected ones.

    Attributes:
        reason: why it is left out; "" where it is kept.
    """

    question: Question
    scored: Scored
    row: Row
    reason: str = ""

    def to_row(self) -> Row:
        """The row, with the reason where it is left out."""
        if not self.reason:
            return self.row
        return {**self.row, "metadata": {**self.row["metadata"], "left_out": self.reason}}


class Selector:
    """Turn samples into outcomes, question by question.

    Args:
        model: its name in the rows.
    """

    def __init__(self, settings: GenerateSettings, prompts: Prompts, data: DataSection, model: str) -> None:
        self._settings, self._prompts, self._model = settings, prompts, model
        self._selection = settings.selection
        self._labeller = RowLabeller(prompts.encoder, data)
        self._texts = TextScorer("13a") if self._selection.needs_library else None
        self._scorers: dict[str, ReplyScorer] = {}  # by the template variables of a row
        self._said: dict[bytes, set[bytes]] = {}  # answers to prompts that come more than once
        self.tally = Tally()

    def outcomes(self, log: SampleLog) -> Iterator[Outcome]:
        """The outcomes of all samples, in the order of the data."""
        numbered = self._prompts.questions()
        while some := list(itertools.islice(numbered, _TOGETHER)):
            references = self._references([question for _, question in some])
            made = [
                [self._score(question, sample, reference) for sample in log.read(number, self._settings.samples)]
                for (number, question), reference in zip(some, references, strict=True)
            ]
            rows = (RawRow("sample", place, one.row) for place, one in enumerate(itertools.chain.from_iterable(made)))
            labelled = self._labeller.label(rows)
            for (number, _), outcomes in zip(some, made, strict=True):
                for one in outcomes:
                    one.reason = self._fault(number, one.scored, next(labelled))
                self._choose(number, outcomes)
                self._count(outcomes)
                yield from outcomes

    def _score(self, question: Question, sample: Sample, reference: str | None) -> Outcome:
        scored = score_sample(self._scorer(question), question, sample, reference)
        return Outcome(question, scored, self._row(question, scored))

    def _scorer(self, question: Question) -> ReplyScorer:
        """How replies to a question are read; a row's template variables may open its reasoning in the prompt."""
        variables = question.row.get("chat_template_kwargs", {})
        key = json.dumps(variables, sort_keys=True)
        if key not in self._scorers:
            self._scorers[key] = ReplyScorer(self._texts, reply_format(self._prompts.encoder, variables))
        return self._scorers[key]

    def _references(self, questions: Sequence[Question]) -> Iterator[str | None]:
        """The text of each reference as training renders it; None where a row has none that could be trained on."""
        rows = [RawRow("reference", n, q.answered(q.reference)) for n, q in enumerate(questions) if q.reference]
        labelled = {row.number: row for row in self._labeller.label(rows)}
        for number in range(len(questions)):
            row = labelled.get(number)
            if row is None or row.status != "used":
                yield None
                continue
            place, start = begin_of_reply(row)
            yield decode_reply(self._prompts.encoder, row.samples[place].input_ids[start:].tolist())

    def _row(self, question: Question, scored: Scored) -> Row:
        sample = scored.sample
        about: Row = {"row": question.where, "sample": sample.sample, "model": self._model}
        about |= {"turn": question.turn} if self._settings.replies == "all" else {}
        about |= {"seed": self._settings.seed, "finish_reason": sample.finish_reason, "tokens": sample.tokens}
        about |= {"logprob": round(sample.logprob, 2)} if sample.logprob is not None else {}
        about |= {"scores": scored.shown_scores()}
        return question.answered(answer_message(question, scored.parts)) | {"metadata": about}

    def _fault(self, number: int, scored: Scored, labelled: LabelledRow) -> str:
        """Why a sample cannot be used, whatever the others are; "" if it can."""
        sample, parts = scored.sample, scored.parts
        if sample.error:
            return _ERRORS.get(sample.error, f"error: {sample.error}")
        if sample.finish_reason == "length" and not self._selection.keeps_cut:
            return CUT
        if not parts.content.strip() and not parts.tool_calls:
            return EMPTY
        if "\ufffd" in sample.text:  # trained on, it would be another character than the model wrote
            return BROKEN
        said = [parts.content, parts.reasoning or "", *(call.text for call in parts.tool_calls)]
        if any(control in text for control in sample.controls for text in said):
            return CONTROL
        if labelled.status != "used":
            return f"train refuses it: {labelled.reason}"
        place, start = begin_of_reply(labelled)
        if labelled.samples[place].input_ids[:start].tolist() != self._prompts.ids(number):
            return OTHER_PROMPT
        return find_fault(scored, self._selection.all_checks) or ""

    def _choose(self, number: int, outcomes: Sequence[Outcome]) -> None:
        """Leave out repetitions, and samples beyond the most of a row."""
        digest = self._prompts.digest(number)
        said = self._said.setdefault(digest, set()) if self._prompts.times[digest] > 1 else set()
        usable = sorted((one for one in outcomes if not one.reason), key=lambda one: -rank(one.scored, self._selection))
        kept = 0
        for one in usable:
            answer = _digest(one.row["messages"][-1])
            if answer in said:
                one.reason = REPEATED
            elif self._selection.most is not None and kept >= self._selection.most:
                one.reason = NOT_BEST
            else:
                said.add(answer)
                kept += 1

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        tally = self.tally
        tally.questions += 1
        tally.answered += any(not one.reason for one in outcomes)
        for one in outcomes:
            tokens = one.scored.sample.tokens
            tally.samples += 1
            tally.tokens += tokens
            if not one.reason:
                tally.kept += 1
                tally.kept_tokens += tokens
                continue
            left_out = tally.left_out.setdefault(one.reason, LeftOut())
            left_out.count += 1
            if len(left_out.samples) < _NAMED:
                left_out.samples.append(f"{one.question.where}#{one.scored.sample.sample}")


_ERRORS = {
    "context-full": "the prompt leaves no room for a reply in the model's context",
    "prompt-empty": "the prompt is empty",
    "token-out-of-range": "the prompt has token ids that the model does not know",
}


def _digest(message: Mapping[str, Any]) -> bytes:
    """Of what a reply says; white space at its ends does not matter."""
    said = {name: value.strip() if isinstance(value, str) else value for name, value in message.items()}
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).digest()
