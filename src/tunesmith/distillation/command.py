"""`tunesmith generate` as a command: its flags as settings, and the summary that it prints."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.display import one_line
from tunesmith.distillation.answers import format_answers
from tunesmith.distillation.settings import RANKINGS, GenerateSettings, Selection, read_check
from tunesmith.errors import UsageError
from tunesmith.evaluation.settings import data_section
from tunesmith.evaluation.table import Progress

_SAME_NAMES = (
    "model", "output", "replies", "samples", "max_new_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "stop", "system", "limit", "seed", "max_rows", "rejected", "tokenizer", "trust_remote_code",
    "allow_changed_base",
)  # fmt: skip


def run_generate(options: argparse.Namespace, template_kwargs: Mapping[str, Any]) -> None:
    """Generate, and print what became of the rows and samples."""
    keys = {name: value for name, value in vars(options).items() if name.startswith("data.")}
    selection = select(options.keep, options.check, options.score, options.keep_per_row, options.keep_cut)
    settings = GenerateSettings(
        data=data_section(keys | dict(template_kwargs)),
        selection=selection,
        overwrites=options.overwrite,
        config=options.model_config,
        **{name: getattr(options, name) for name in _SAME_NAMES},
    )
    from tunesmith.distillation.run import generate_answers

    answers = generate_answers(settings, Progress())
    lines = [*format_answers(answers), "", f"{'answers':<10}{options.output}", f"{'train':<10}{_train(options)}"]
    print("\n".join(one_line(line) for line in lines))


def _train(options: argparse.Namespace) -> str:
    """The command to try next."""
    return f"tunesmith train --model M --data {shlex.quote(str(options.output))} --output RUN"


def select(keep: Any, checks: Sequence[str], score: str | None, keep_per_row: int | None, keeps_cut: bool) -> Selection:
    """Raises:
    UsageError: a check or a score is not known.
    """
    if score is not None and score not in RANKINGS:
        raise UsageError(f"--score {score}: unknown score; there are {', '.join(RANKINGS)}.", code="unknown-score")
    return Selection(keep, [read_check(text) for text in checks], score, keep_per_row, keeps_cut)
