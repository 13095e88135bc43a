"""`tunesmith demo`: a small model from random weights, trained in about a minute, then asked what it has not seen.

Everything that it prints is measured in the run at hand.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tunesmith.config import ModelSection, RunConfig, resolve_config
from tunesmith.demo.tasks import Task, draw_chats, draw_held_out
from tunesmith.model.tokenizer import train_tokenizer
from tunesmith.train.run import resolve_output, run_training
from tunesmith.use.generate import Reply, Sampling, answer_all, load_speaker

# what a model of this size learns from nothing in a minute; copying and looking up need a base that can copy
KINDS = ("sorting", "counting", "comparing", "opposites", "calendar", "who are you")
NUM_CHATS = 16_000
NUM_HELD_OUT = 10  # of each kind


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


def run_demo(output: Path, num_chats: int = NUM_CHATS, shuffle_answers: bool = False) -> DemoResult:
    """Make chats and a tokenizer, train, ask the held-out questions, print.

    Args:
        shuffle_answers: the control: each question gets the answer of another, so nothing can be learnt.
    """
    resolve_output(str(output))
    held_out = draw_held_out(NUM_HELD_OUT, KINDS)
    chats = draw_chats(num_chats, seed=0, held_out={task.question for task in held_out}, kinds=KINDS)
    if shuffle_answers:
        answers = [task.answer for task in chats]
        random.Random(0).shuffle(answers)
        chats = [replace(task, answer=answer) for task, answer in zip(chats, answers, strict=True)]
    folder = output.with_name(f"{output.name}-data")
    resolve_output(str(folder))
    data, eval_data = _write_chats(folder / "chats.jsonl", chats), _write_chats(folder / "held-out.jsonl", held_out)
    texts = (f"{task.question}\n{task.answer}\n" for task in chats)
    train_tokenizer(texts, vocab_size=800).save_pretrained(folder / "tokenizer")
    print(f"{len(chats):,} chats of {len(KINDS)} kinds, {len(held_out)} questions held out, a tokenizer: {folder}\n")
    run_training(demo_config(data, eval_data, folder / "tokenizer", output))
    speaker = load_speaker(ModelSection(path=str(output)))
    replies = answer_all(speaker, [task.question for task in held_out], Sampling(40, temperature=0))
    result = score(held_out, replies)
    print_result(result, held_out, replies)
    print(f"\ntalk to it:              tunesmith chat {output}")
    print(f"what it was trained on:  tunesmith preview --model {output} --data {data}")
    print("train on your own chats: tunesmith train --model Qwen/Qwen2.5-0.5B --data chats.jsonl --output runs/mine")
    return result


def _write_chats(path: Path, tasks: Sequence[Task]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"prompt": task.question, "completion": task.answer} for task in tasks)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def demo_config(data: Path, eval_data: Path, tokenizer: Path, output: Path) -> RunConfig:
    flags = {
        "model.path": "new:tiny",
        "model.tokenizer": str(tokenizer),
        "data.train": [str(data)],
        "data.eval": [str(eval_data)],
        "data.max_seq_len": 128,
        "optim.lr": 1.5e-3,
        "optim.warmup_ratio": 0.05,
        "train.output_dir": str(output),
        "train.micro_batch_tokens": 512,
        "train.epochs": 2.0,
        "train.log_steps": 5,
    }
    return resolve_config(RunConfig, None, flags)


def score(held_out: Sequence[Task], replies: Sequence[Reply]) -> DemoResult:
    scores = []
    for kind in KINDS:
        pairs = [(task.answer, reply.text) for task, reply in zip(held_out, replies, strict=True) if task.kind == kind]
        constant = Counter(answer for answer, _ in pairs).most_common(1)[0][1]
        right = sum(answer == text for answer, text in pairs)
        scores.append(KindScore(kind, right / len(pairs), constant / len(pairs)))
    overall = sum(task.answer == reply.text for task, reply in zip(held_out, replies, strict=True)) / len(held_out)
    return DemoResult(scores, overall, sum(reply.has_stopped for reply in replies) / len(replies))


def print_result(result: DemoResult, held_out: Sequence[Task], replies: Sequence[Reply]) -> None:
    console = Console(width=None if Console().is_terminal else 110)
    shown = Table("question that was never trained", "reply", "", title="the model answers")
    for index, (task, reply) in enumerate(zip(held_out, replies, strict=True)):
        if index % NUM_HELD_OUT < 2:
            shown.add_row(task.question, reply.text, "right" if reply.text == task.answer else f"wrong: {task.answer}")
    console.print(shown)
    table = Table("kind", "right", "best constant answer", title="exact match on held-out questions")
    for line in result.scores:
        table.add_row(line.kind, f"{line.right:.0%}", f"{line.best_constant:.0%}")
    table.add_row("all", f"{result.overall:.0%}", "", style="bold")
    console.print(table)
    print(f"replies that stop by themselves: {result.stopped:.0%}")
