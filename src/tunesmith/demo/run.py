"""`tunesmith demo`: fine-tune the packaged base model on chats of small tasks with checkable answers.

All figures that it prints are measured in that run.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.demo.chats import NUM_TURNS, Chat, draw_chats, draw_held_out
from tunesmith.demo.exam import KindScore, ask, score_kinds, score_right, share_right, share_stopped
from tunesmith.display import raw_stream, visible
from tunesmith.evaluation.records import Score
from tunesmith.generation.replies import Reply
from tunesmith.report.write import reported
from tunesmith.run.console import ConsoleReporter
from tunesmith.run.folder import resolve_output
from tunesmith.run.start import run_training
from tunesmith.runfolder import RunFolder, read_metrics

# how often each kind is trained: some need more practice. Looking up, which the base has drilled too, is left out:
# a model of this size gets 10 % of it right
SHARES = {"greetings": 1.5, "who are you": 1.5, "sorting": 1.2, "counting": 1.0, "comparing": 4.0, "opposites": 2.0,
          "calendar": 2.5, "translation": 1.2, "format": 0.6, "copying": 1.4, "first and last": 1.2}  # fmt: skip
ABILITIES = {  # what a person may ask, by kind; with other lengths and words the model fails
    "greetings": "hello, thanks, goodbye",
    "who are you": "what it is and what it can do",
    "sorting": "four digits",
    "counting": "up to eight words or characters",
    "comparing": "two numbers below 100",
    "opposites": "of common words",
    "calendar": "days of the week and months",
    "translation": "a colour or size and a thing",
    "format": "three words with commas or as a list",
    "copying": "three words",
    "first and last": "of three words",
}
NUM_QUESTIONS = 62_000  # in all chats together
NUM_HELD_OUT = 20  # questions of each kind
_NUM_SHOWN = 2  # of each kind, printed side by side
_SHORT = 32


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Shares of right answers to held-out questions, and what else was measured.

    Attributes:
        by_turn: of all kinds together.
    """

    scores: list[KindScore]
    by_turn: tuple[float, ...]
    overall: Score
    overall_before: float
    stopped: float
    perplexity_before: float
    perplexity_after: float


def base_folder() -> Path:
    """The base model in the package; scripts/make_base.py made it."""
    return Path(str(resources.files("tunesmith").joinpath("demo", "base")))


def run_demo(output: Path, num_questions: int = NUM_QUESTIONS, shuffle_answers: bool = False) -> DemoResult:
    """Make chats, train the base on them, ask the held-out questions before and after, print.

    Args:
        shuffle_answers: the control: each question gets the answer of another, so nothing can be learnt.
    """
    resolve_output(str(output))
    held_out, kept_out = draw_held_out(NUM_HELD_OUT, list(SHARES))
    chats = draw_chats(num_questions, seed=0, held_out=kept_out, shares=SHARES)
    if shuffle_answers:
        chats = _shuffle_answers(chats)
    folder = output.with_name(f"{output.name}-data")
    resolve_output(str(folder))
    try:
        data, eval_data = _write_chats(folder / "chats.jsonl", chats), _write_chats(folder / "held-out.jsonl", held_out)
    except BaseException:  # a full disk, Ctrl-C: the demo can be started again under the same name
        shutil.rmtree(folder, ignore_errors=True)
        raise
    print(
        f"{num_questions:,} questions of {len(SHARES)} kinds in {len(chats):,} chats; {NUM_HELD_OUT} questions of each "
        f"kind held out: {folder}\n"
    )
    before = ask(base_folder(), held_out)
    reporter = ConsoleReporter()
    with reported(output, reporter.note):
        run_training(demo_config(data, eval_data, output), reporter)
    after = ask(output, held_out)
    result = measure(held_out, before, after, output)
    print_result(result, held_out, before, after)
    print_suggestions(held_out)
    print(f"\ntalk to it:              tunesmith chat {output}")
    print(f"what it was trained on:  tunesmith preview --model {output} --data {data}")
    print(f"scores and a page:       tunesmith evaluate {output} --base   (needs: pip install 'tunesmith[evaluate]')")
    print("train on your own chats: tunesmith train --model Qwen/Qwen2.5-0.5B --data chats.jsonl --output runs/mine")
    return result


def _shuffle_answers(chats: Sequence[Chat]) -> list[Chat]:
    answers = [task.answer for chat in chats for task in chat]
    random.Random(0).shuffle(answers)
    rest = iter(answers)
    return [tuple(replace(task, answer=next(rest)) for task in chat) for chat in chats]


def _write_chats(path: Path, chats: Sequence[Chat]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for chat in chats:
            turns = [
                {"role": role, "content": text}
                for task in chat
                for role, text in (("user", task.question), ("assistant", task.answer))
            ]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return path


def demo_config(data: Path, eval_data: Path, output: Path) -> RunConfig:
    flags = {
        "model.path": str(base_folder()),
        "data.train": [str(data)],
        "data.eval": [str(eval_data)],
        "data.chat_template": "chatml",
        "data.max_seq_len": 384,
        "optim.lr": 2e-3,
        "optim.warmup_ratio": 0.03,
        "train.output_dir": str(output),
        "train.micro_batch_tokens": 384,
        "train.epochs": 1.0,
        "train.log_steps": 5,
    }
    return resolve_config(RunConfig, None, flags)


def measure(
    chats: Sequence[Chat], before: Sequence[Sequence[Reply]], after: Sequence[Sequence[Reply]], output: Path
) -> DemoResult:
    records = read_metrics(RunFolder(output).metrics)
    perplexities = [record["eval_perplexity"] for record in records if "eval_perplexity" in record]
    return DemoResult(
        scores=score_kinds(chats, after, list(SHARES)),
        by_turn=tuple(share_right(chats, after, turn) for turn in range(NUM_TURNS)),
        overall=score_right(chats, after),
        overall_before=share_right(chats, before),
        stopped=share_stopped(after),
        perplexity_before=perplexities[0],
        perplexity_after=perplexities[-1],
    )


def print_result(
    result: DemoResult, chats: Sequence[Chat], before: Sequence[Sequence[Reply]], after: Sequence[Sequence[Reply]]
) -> None:
    console = _console()
    shown = Table("held-out question", "before", "after", title="replies to questions that were never trained")
    left = dict.fromkeys(SHARES, _NUM_SHOWN)
    for chat, replies_before, replies_after in zip(chats, before, after, strict=True):
        for task, old, new in zip(chat, replies_before, replies_after, strict=True):
            if left[task.kind] and old is replies_before[0]:
                left[task.kind] -= 1
                mark = "right" if new.text == task.answer else f"wrong: {task.answer}"
                cells = (task.question, _shorten(old.text), f"{new.text}  ({mark})")
                shown.add_row(*(Text(visible(cell)) for cell in cells))
    console.print(shown)
    turns = ["1st turn", "2nd turn", "3rd turn"]
    table = Table("kind", *turns, "best constant answer", title="exact match on held-out questions, by turn of a chat")
    for line in result.scores:
        table.add_row(line.kind, *(f"{right:.0%}" for right in line.right), f"{line.best_constant:.0%}")
    table.add_row("all", *(f"{right:.1%}" for right in result.by_turn), "", style="bold")
    console.print(table)
    overall = result.overall
    interval = f" (95 % interval {overall.low:.1%} to {overall.high:.1%})" if overall.low and overall.high else ""
    print(f"all turns:                       {overall.value:.1%} right{interval}, {result.overall_before:.1%} before")
    print(f"replies that stop by themselves: {result.stopped:.1%}")
    print(
        f"perplexity of held-out answers:  {result.perplexity_before:.2f} before, {result.perplexity_after:.2f} after"
    )


def print_suggestions(chats: Sequence[Chat]) -> None:
    """What the model can be asked, with a held-out question of each kind to try."""
    first: dict[str, str] = {}
    for chat in chats:
        for task in chat:
            first.setdefault(task.kind, task.question)
    table = Table("kind", "what it can answer", "try", title="what to ask it, in any order, in English or Chinese")
    for kind, ability in ABILITIES.items():
        table.add_row(kind, ability, Text(visible(first[kind])))
    console = _console()
    console.print()
    console.print(table)
    print("It is too small for other questions: they get an answer of one of these kinds.")


def _console() -> Console:
    stream = raw_stream(sys.stdout)
    return Console(file=stream, width=None if Console(file=stream).is_terminal else 120)


def _shorten(text: str) -> str:
    text = text.replace("\n", " ").strip()
    return text if len(text) <= _SHORT else text[: _SHORT - 1] + "…"
