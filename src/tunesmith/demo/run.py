"""`tunesmith demo`: fine-tune the base model in the package on small checkable tasks, then ask what was held out.

Everything that it prints is measured in the run at hand.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.config import ModelSection, RunConfig, resolve_config
from tunesmith.demo.tasks import TASKS, Task, draw_chats, draw_held_out
from tunesmith.train.run import resolve_output, run_training
from tunesmith.use.generate import Reply, Sampling, answer_all, load_speaker

NUM_CHATS = 24_000
NUM_HELD_OUT = 20  # of each kind
EPOCHS = 1.0
_SHOWN = 2  # held-out questions of each kind that are also put to the base, and printed


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
    stopped: float
    perplexity_before: float
    perplexity_after: float


def base_folder() -> Path:
    """The base model in the package; scripts/make_base.py made it."""
    return Path(str(resources.files("tunesmith").joinpath("demo", "base")))


def run_demo(output: Path, num_chats: int = NUM_CHATS, shuffle_answers: bool = False) -> DemoResult:
    """Train, compare before and after, print.

    Args:
        shuffle_answers: the control: each question gets the answer of another, so nothing can be learnt.
    """
    resolve_output(str(output))
    held_out = draw_held_out(NUM_HELD_OUT)
    chats = draw_chats(num_chats, seed=0, held_out={task.question for task in held_out})
    if shuffle_answers:
        answers = [task.answer for task in chats]
        random.Random(0).shuffle(answers)
        chats = [replace(task, answer=answer) for task, answer in zip(chats, answers, strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    data = _write_chats(output.with_name(f"{output.name}-chats.jsonl"), chats)
    eval_data = _write_chats(output.with_name(f"{output.name}-held-out.jsonl"), held_out)
    print(f"{len(chats):,} chats of {len(TASKS)} kinds: {data}\n{len(held_out)} questions held out: {eval_data}\n")
    shown = [task for index, task in enumerate(held_out) if index % NUM_HELD_OUT < _SHOWN]
    before = ask(base_folder(), shown)
    run_training(demo_config(data, eval_data, output))
    after = ask(output, held_out)
    result = score(held_out, after, output)
    print_result(result, shown, before, {task.question: reply for task, reply in zip(held_out, after, strict=True)})
    print(f"\ntalk to it:            tunesmith chat {output}")
    print(f"what it was trained on: tunesmith preview --model {output} --data {data}")
    print("train on your chats:   tunesmith train --model Qwen/Qwen2.5-0.5B --data chats.jsonl --output runs/mine")
    return result


def _write_chats(path: Path, tasks: Sequence[Task]) -> Path:
    rows = ({"prompt": task.question, "completion": task.answer} for task in tasks)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def demo_config(data: Path, eval_data: Path, output: Path) -> RunConfig:
    flags = {
        "model.path": str(base_folder()),
        "data.train": [str(data)],
        "data.eval": [str(eval_data)],
        "data.max_seq_len": 256,
        "optim.lr": 2e-3,
        "optim.warmup_ratio": 0.03,
        "train.output_dir": str(output),
        "train.micro_batch_tokens": 1024,
        "train.epochs": EPOCHS,
        "train.log_steps": 5,
    }
    return resolve_config(RunConfig, None, flags)


def ask(model: Path, tasks: Sequence[Task]) -> list[Reply]:
    speaker = load_speaker(ModelSection(path=str(model)))
    return answer_all(speaker, [task.question for task in tasks], Sampling(40, temperature=0))


def score(held_out: Sequence[Task], replies: Sequence[Reply], output: Path) -> DemoResult:
    scores = []
    for kind in TASKS:
        pairs = [(task.answer, reply.text) for task, reply in zip(held_out, replies, strict=True) if task.kind == kind]
        constant = Counter(answer for answer, _ in pairs).most_common(1)[0][1]
        right = sum(answer == text for answer, text in pairs)
        scores.append(KindScore(kind, right / len(pairs), constant / len(pairs)))
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    perplexities = [record["eval_perplexity"] for record in records if "eval_perplexity" in record]
    overall = sum(task.answer == reply.text for task, reply in zip(held_out, replies, strict=True)) / len(held_out)
    stopped = sum(reply.has_stopped for reply in replies) / len(replies)
    return DemoResult(scores, overall, stopped, perplexities[0], perplexities[-1])


def print_result(result: DemoResult, shown: Sequence[Task], before: Sequence[Reply], after: dict[str, Reply]) -> None:
    console = Console(width=None if Console().is_terminal else 120)
    replies = Table("held-out question", "before", "after", title="replies to questions that were never trained")
    for task, reply in zip(shown, before, strict=True):
        mark = "✓" if after[task.question].text == task.answer else f"✗ {task.answer}"
        cells = (task.question, _short(reply.text), f"{after[task.question].text}  {mark}")
        replies.add_row(*(Text(cell) for cell in cells))
    console.print(replies)
    table = Table("kind", "right", "best constant answer", title="exact match on held-out questions")
    for line in result.scores:
        table.add_row(line.kind, f"{line.right:.0%}", f"{line.best_constant:.0%}")
    table.add_row("all", f"{result.overall:.1%}", "", style="bold")
    console.print(table)
    print(f"replies that stop by themselves: {result.stopped:.1%}")
    print(
        f"perplexity on held-out answers:  {result.perplexity_before:.2f} before, {result.perplexity_after:.2f} after"
    )


def _short(text: str) -> str:
    text = text.replace("\n", " ").strip()
    return text if len(text) <= 32 else text[:31] + "…"
