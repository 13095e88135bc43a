"""`tunesmith demo`: fine-tune the packaged base model on small tasks with checkable answers.

Everything that it prints is measured in the run at hand.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import ModelSection, RunConfig
from tunesmith.demo.tasks import HeldOut, Task, draw_chats, draw_held_out
from tunesmith.display import raw_stream, visible
from tunesmith.rows.conversation import Message
from tunesmith.run.folder import resolve_output
from tunesmith.run.start import run_training
from tunesmith.runfolder import RunFolder, read_metrics
from tunesmith.use.batch import Sampling
from tunesmith.use.generate import Reply, load_speaker, reply_to

# how often each kind is trained: some need more practice. Looking up, which the base has drilled too, is left out:
# a model of this size gets 10 % of it right
SHARES = {"sorting": 1.0, "counting": 1.0, "comparing": 3.0, "opposites": 2.0, "calendar": 3.0, "translation": 1.0,
          "format": 1.0, "copying": 1.0, "first and last": 1.0, "who are you": 1.0}  # fmt: skip
NUM_CHATS = 60_000
NUM_HELD_OUT = 20  # of each kind
_NUM_SHOWN = 2  # of each kind, printed side by side
_SHORT = 32


@dataclass(frozen=True, slots=True)
class KindScore:
    """Exact match on the held-out questions of a kind, beside the best answer that looks at no question."""

    kind: str
    right: float
    best_constant: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    scores: list[KindScore]
    overall: float
    overall_before: float
    stopped: float
    perplexity_before: float
    perplexity_after: float


def base_folder() -> Path:
    """The base model in the package; scripts/make_base.py made it."""
    return Path(str(resources.files("tunesmith").joinpath("demo", "base")))


def run_demo(output: Path, num_chats: int = NUM_CHATS, shuffle_answers: bool = False) -> DemoResult:
    """Make chats, train the base on them, ask the held-out questions before and after, print.

    Args:
        shuffle_answers: the control: each question gets the answer of another, so nothing can be learnt.
    """
    resolve_output(str(output))
    held_out = draw_held_out(NUM_HELD_OUT, SHARES)
    chats = draw_chats(num_chats, seed=0, held_out=HeldOut.of(draw_held_out()), shares=SHARES)
    if shuffle_answers:
        answers = [task.answer for task in chats]
        random.Random(0).shuffle(answers)
        chats = [replace(task, answer=answer) for task, answer in zip(chats, answers, strict=True)]
    folder = output.with_name(f"{output.name}-data")
    resolve_output(str(folder))
    try:
        data, eval_data = _write_chats(folder / "chats.jsonl", chats), _write_chats(folder / "held-out.jsonl", held_out)
    except BaseException:  # a full disk, Ctrl-C: the demo can be begun again under the same name
        shutil.rmtree(folder, ignore_errors=True)
        raise
    print(f"{len(chats):,} chats of {len(SHARES)} kinds, {len(held_out)} questions held out: {folder}\n")
    before = ask(base_folder(), held_out)
    run_training(demo_config(data, eval_data, output))
    after = ask(output, held_out)
    result = score(held_out, before, after, output)
    print_result(result, held_out, before, after)
    print(f"\ntalk to it:              tunesmith chat {output}")
    print(f"what it was trained on:  tunesmith preview --model {output} --data {data}")
    print("train on your own chats: tunesmith train --model Qwen/Qwen2.5-0.5B --data chats.jsonl --output runs/mine")
    return result


def _write_chats(path: Path, tasks: Sequence[Task]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"prompt": task.question, "completion": task.answer} for task in tasks)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def demo_config(data: Path, eval_data: Path, output: Path) -> RunConfig:
    flags = {
        "model.path": str(base_folder()),
        "data.train": [str(data)],
        "data.eval": [str(eval_data)],
        "data.chat_template": "chatml",
        "data.max_seq_len": 128,
        "optim.lr": 1.5e-3,
        "optim.warmup_ratio": 0.03,
        "train.output_dir": str(output),
        "train.micro_batch_tokens": 512,
        "train.epochs": 1.0,
        "train.log_steps": 5,
    }
    return resolve_config(RunConfig, None, flags)


def ask(model: Path, tasks: Sequence[Task]) -> list[Reply]:
    speaker = load_speaker(ModelSection(path=str(model)))
    prompts = [speaker.encoder.encode_prompt([Message("user", task.question)]) for task in tasks]
    return reply_to(speaker, prompts, Sampling(48, temperature=0))


def score(held_out: Sequence[Task], before: Sequence[Reply], after: Sequence[Reply], output: Path) -> DemoResult:
    scores = []
    for kind in SHARES:
        pairs = [(task.answer, reply.text) for task, reply in zip(held_out, after, strict=True) if task.kind == kind]
        constant = Counter(answer for answer, _ in pairs).most_common(1)[0][1]
        scores.append(
            KindScore(kind, sum(answer == text for answer, text in pairs) / len(pairs), constant / len(pairs))
        )
    records = read_metrics(RunFolder(output).metrics)
    perplexities = [record["eval_perplexity"] for record in records if "eval_perplexity" in record]
    stopped = sum(reply.has_stopped for reply in after) / len(after)
    overall, overall_before = _share_right(held_out, after), _share_right(held_out, before)
    return DemoResult(scores, overall, overall_before, stopped, perplexities[0], perplexities[-1])


def _share_right(tasks: Sequence[Task], replies: Sequence[Reply]) -> float:
    return sum(task.answer == reply.text for task, reply in zip(tasks, replies, strict=True)) / len(tasks)


def print_result(result: DemoResult, tasks: Sequence[Task], before: Sequence[Reply], after: Sequence[Reply]) -> None:
    stream = raw_stream(sys.stdout)
    console = Console(file=stream, width=None if Console(file=stream).is_terminal else 120)
    shown = Table("held-out question", "before", "after", title="replies to questions that were never trained")
    for index, task in enumerate(tasks):
        if index % NUM_HELD_OUT < _NUM_SHOWN:
            reply = after[index].text
            mark = "right" if reply == task.answer else f"wrong: {task.answer}"
            cells = (task.question, _shorten(before[index].text), f"{reply}  ({mark})")
            shown.add_row(*(Text(visible(cell)) for cell in cells))
    console.print(shown)
    table = Table("kind", "right", "best constant answer", title="exact match on held-out questions")
    for line in result.scores:
        table.add_row(line.kind, f"{line.right:.0%}", f"{line.best_constant:.0%}")
    table.add_row("all", f"{result.overall:.1%} (before: {result.overall_before:.1%})", "", style="bold")
    console.print(table)
    print(f"replies that stop by themselves: {result.stopped:.1%}")
    print(
        f"perplexity of held-out answers:  {result.perplexity_before:.2f} before, {result.perplexity_after:.2f} after"
    )


def _shorten(text: str) -> str:
    text = text.replace("\n", " ").strip()
    return text if len(text) <= _SHORT else text[: _SHORT - 1] + "…"
