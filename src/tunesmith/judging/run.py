"""`tunesmith evaluate --judge`: show pairs of replies to a judge in both orders, and add its verdicts."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from tunesmith.errors import InterruptedRun, TunesmithError
from tunesmith.evaluation.records import (
    Evaluation,
    EvaluationFolder,
    ReplyRecord,
    read_replies,
    write_evaluation,
)
from tunesmith.judging.endpoint import Endpoint
from tunesmith.judging.question import Verdict, build_question, hash_question, read_verdict
from tunesmith.judging.settings import JudgeSettings
from tunesmith.judging.tally import INTERVALS, REFERENCE, Judged, Tally, tally
from tunesmith.reading import read_text

_HOPELESS = 10  # answers without any verdict, after which no more are asked for


class JudgeProgress(Protocol):
    def begin(self, title: str, total: int, done: int = 0) -> None: ...
    def update(self, done: int, total: int) -> None: ...
    def note(self, text: str) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Judgement:
    """A line of judge.jsonl: one question and its answer.

    Attributes:
        question: hash of the judge's model and the messages.
        first, second: names of the models whose replies stood there.
        verdict: None where the answer holds none.
        problem: why there is no answer; "" otherwise.
    """

    question: str
    row: str
    turn: int
    first: str
    second: str
    judge: str
    verdict: Verdict | None
    answer: str
    problem: str = ""

    def to_line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Question:
    """One order of a pair of replies, about to be asked."""

    row: str
    turn: int
    first: str
    second: str
    messages: Sequence[dict[str, str]]
    hash: str


def run_judge(
    folder: EvaluationFolder, evaluation: Evaluation, settings: JudgeSettings, progress: JudgeProgress
) -> Evaluation:
    """Judge the replies of an evaluation, and write its evaluate.json with the verdicts.

    Answers that judge.jsonl has already are not asked for again.

    Raises:
        TunesmithError: the judge cannot be used.
        InterruptedRun: Ctrl-C; the same command continues.
    """
    replies: dict[str, dict[tuple[str, int], ReplyRecord]] = {}
    for record in read_replies(folder):
        replies.setdefault(record.model, {})[(record.row, record.turn)] = record
    compared = pairs_of(evaluation)
    questions = {pair: list(ask_both_orders(replies, *pair, settings.model)) for pair in compared}
    answers = JudgementLog(folder.judgements)
    try:
        _ask_all([one for found in questions.values() for one in found], answers, settings, progress)
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; the judge's answers are in {folder.judgements}, and the same command continues from there",
            code="evaluation-interrupted",
        ) from None
    finally:
        progress.end()
    seed = int(evaluation.settings.get("seed", 0))
    tallies = [tally(*pair, list(_judged(found, answers.done)), seed) for pair, found in questions.items()]
    judged = replace(evaluation, judge=describe(settings, tallies))
    write_evaluation(folder, judged)
    return judged


def describe(settings: JudgeSettings, tallies: Sequence[Tally]) -> dict[str, Any]:
    """The judge's part of evaluate.json."""
    return {
        "model": settings.model,
        "url": settings.shown_url,
        "method": "each pair in both orders; win rate: mean of both, ties and contradictions half a win each",
        "intervals": INTERVALS,
        "comparisons": [one.to_json() for one in tallies],
    }


def pairs_of(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The models that are compared, as in the differences of scores; one model alone is compared with the data."""
    if evaluation.differences:
        return [(difference.model, difference.reference) for difference in evaluation.differences]
    return [(model.name, REFERENCE) for model in evaluation.models]


def ask_both_orders(
    replies: Mapping[str, Mapping[tuple[str, int], ReplyRecord]], model: str, reference: str, judge: str
) -> Iterator[Question]:
    """Both orders of every pair, one after the other. Equal replies are not asked about: they are ties."""
    others = replies.get(reference, {})
    for key, record in replies.get(model, {}).items():
        other = others.get(key)
        if other is None and reference != REFERENCE:
            continue
        texts = {model: record.reply, reference: other.reply if other else record.reference}
        for first, second in ((model, reference), (reference, model)):
            messages = build_question(record.prompt, texts[first], texts[second])
            yield Question(*key, first, second, messages, hash_question(judge, messages) if _differ(texts) else "")


def _differ(texts: Mapping[str, str]) -> bool:
    return len(set(texts.values())) > 1


class JudgementLog:
    """judge.jsonl: every answer, appended as it comes; a line that a kill cut is left out and asked for again."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.done: dict[str, Judgement] = {}
        names = {one.name for one in fields(Judgement)}
        lines = read_text(path, errors="replace").split("\n") if path.exists() else []
        for line in lines:
            try:
                content = json.loads(line)
                if set(content) == names and content["verdict"] in ("first", "second", "tie", None):
                    self.done[str(content["question"])] = Judgement(**content)
            except (ValueError, TypeError, RecursionError):
                continue
        self._is_cut = bool(lines) and lines[-1] != ""

    def add(self, judgement: Judgement) -> None:
        with self._lock, self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(("\n" if self._is_cut else "") + judgement.to_line())
            self._is_cut = False
            self.done[judgement.question] = judgement


def _ask_all(
    questions: Sequence[Question], answers: JudgementLog, settings: JudgeSettings, progress: JudgeProgress
) -> None:
    every = {one.hash: one for one in questions if one.hash}
    waiting = [one for key, one in every.items() if key not in answers.done]
    done, total = len(every) - len(waiting), len(every)
    if not waiting:
        return
    progress.begin(f"judge {settings.model}", total, done)
    if done:
        progress.note(f"judge {settings.model}: {done:,} answers of an earlier process are kept")
    endpoint = Endpoint(settings)
    asked = without = 0

    def ask(one: Question) -> Judgement:
        answer = endpoint.ask(one.messages)
        verdict = read_verdict(answer.text)
        judgement = Judgement(
            one.hash, one.row, one.turn, one.first, one.second, settings.model, verdict, answer.text, answer.problem
        )
        answers.add(judgement)  # at once: it may be paid for
        return judgement

    for judgement in _in_parallel(ask, waiting, settings.parallel, endpoint):
        done, asked, without = done + 1, asked + 1, without + (judgement.verdict is None)
        progress.update(done, total)
        if asked == without == _HOPELESS:
            said = judgement.problem or judgement.answer or "nothing"
            raise TunesmithError(
                f"--judge {settings.shown_url}: none of the first {asked} answers of {settings.model} ends with a "
                f"verdict; the last one says: {said[:300]!r}. Use another model.",
                code="judge-unusable",
            )


def _in_parallel(
    ask: Callable[[Question], Judgement], waiting: Sequence[Question], parallel: int, endpoint: Endpoint
) -> Iterator[Judgement]:
    """Answers as they come; no more than `parallel` questions are on their way. After an error no more are asked.

    The threads are daemons: Ctrl-C must not wait for a slow server.
    """
    todo: queue.SimpleQueue[Question] = queue.SimpleQueue()
    found: queue.SimpleQueue[Judgement | Exception] = queue.SimpleQueue()
    for one in waiting:
        todo.put(one)

    def work() -> None:
        while not endpoint.stopped.is_set():
            try:
                one = todo.get_nowait()
            except queue.Empty:
                return
            try:
                found.put(ask(one))
            except Exception as error:
                endpoint.stopped.set()
                found.put(error)

    for _ in range(min(parallel, len(waiting))):
        threading.Thread(target=work, name="judge", daemon=True).start()
    try:
        for _ in waiting:
            result = found.get()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        endpoint.stopped.set()


def _judged(questions: Sequence[Question], done: Mapping[str, Judgement]) -> Iterator[Judged]:
    """Pairs from their two questions, which follow each other."""
    for one, two in zip(questions[::2], questions[1::2], strict=True):
        if not one.hash:
            yield Judged(one.row, "tie", "tie", is_equal=True)
            continue
        yield Judged(one.row, done[one.hash].verdict, done[two.hash].verdict)
