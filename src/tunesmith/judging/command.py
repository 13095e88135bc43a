"""`tunesmith evaluate` as a whole: scores, a judge where one is given, and the page."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace

from tunesmith.errors import UsageError
from tunesmith.evaluation.candidates import find_candidates
from tunesmith.evaluation.records import Evaluation, EvaluationFolder
from tunesmith.evaluation.run import choose_output, evaluate_models
from tunesmith.evaluation.settings import EvaluateSettings
from tunesmith.evaluation.table import Progress, format_evaluation
from tunesmith.judging.page import write_page
from tunesmith.judging.run import run_judge
from tunesmith.judging.settings import JudgeSettings
from tunesmith.judging.tally import format_judge


def run_evaluate(settings: EvaluateSettings, judge: JudgeSettings | None, as_json: bool) -> None:
    """Evaluate, and print the scores as a table or as JSON."""
    folder, evaluation = evaluate_and_show(settings, judge, Progress())
    if as_json:
        print(json.dumps(evaluation.to_json()))
        return
    lines = format_evaluation(evaluation)
    if evaluation.judge:
        lines += ["", *format_judge(evaluation.judge)]
    print("\n".join([*lines, "", f"page: {folder.page}"]))


def evaluate_and_show(
    settings: EvaluateSettings, judge: JudgeSettings | None, progress: Progress
) -> tuple[EvaluationFolder, Evaluation]:
    """Evaluate, judge the replies, and write evaluate.html; returns the folder and its evaluate.json.

    Where the judge fails, the scores and their page are there already.

    Raises:
        TunesmithError: a model, the data or the judge cannot be used.
        InterruptedRun: Ctrl-C; the same call continues.
    """
    if judge is not None and settings.replies == "none":
        raise UsageError("--judge: compares replies; --replies none generates none.", code="judge-incomplete")
    output = choose_output(settings, find_candidates(settings, datetime.datetime.now()))
    folder = EvaluationFolder(output)
    evaluation = evaluate_models(replace(settings, output=output), progress)
    write_page(folder, evaluation)
    if judge is not None:
        evaluation = run_judge(folder, evaluation, judge, progress)
        write_page(folder, evaluation)
    return folder, evaluation
