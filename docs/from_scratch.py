"""Train a chat model from raw text, and write docs/from_scratch.md with what the commands printed.

Every command, figure, plot and reply on the page comes from this run; about a quarter of an hour on two CPU cores. What
the finished commands printed is kept in WORK/steps.json, so that a run that was stopped goes on with the same WORK.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.cli import main as tunesmith
from tunesmith.report.charts import Series, line_chart

DOCS = Path(__file__).resolve().parent
QUESTIONS = [
    "Who are you?",
    "What is your name?",
    "Hello, who are you?",
    "Tell me who you are.",
    "Who made you?",
    "你是谁？",
    "你好，你是谁？",
    "你叫什么名字？",
    "Give three tips for staying healthy.",
    "What is the capital of France?",
    "保持健康的三个提示。",
]
COPIES = 12  # of the chats about the model itself
STYLE = "<style>text{fill:#777;font:11px sans-serif}.axis{stroke:#ccc}.s0{stroke:#2563eb}.s1{stroke:#d97706}text.s0{fill:#2563eb;stroke:none}text.s1{fill:#d97706;stroke:none}polyline{fill:none;stroke-width:1.6}circle.s0{fill:#2563eb}circle.s1{fill:#d97706}</style>"

PAGE = """# From raw text to chat, on a laptop

`docs/from_scratch.py` ran the commands below and wrote this page from their output: {machine}.
The text is {books} public-domain books in English and Chinese. The chats are LLaMA-Factory's Alpaca demos in both languages and its identity chats.
A model this small learns the form of an answer from minutes of training, and few facts. The replies at the end are unedited.

The two recipes stop after a fixed number of steps, so more text does not take longer to train, only to read. Little text is read several times: training stops when the loss on held-out text no longer falls, and keeps the best weights.

## 1. Tokenizer

{tokenizer}

## 2. Pre-training: every token of the text

{pretrain}

Evaluation loss on held-out text: **{pre_before:.3f} before, {pre_after:.3f} after** ({pre_tokens:,} tokens, {pre_time:.0f} s).

![pre-training loss](from_scratch_pretrain.svg)

## 3. A name

LLaMA-Factory's identity chats have placeholders for a name and an author, which `tunesmith` refuses to train on as they are. The 80 chats go into the data {copies} times:

{name}

A small model learns who it is from a share of the rows, not from a few of them. In an earlier run with FastChat's identity chats, "Who are you?" began 4 of 2,081 chats and "What is up?" 137, and the model answered the first with the reply to the second: "Hello! How can I help you today?".

## 4. Fine-tuning: only the replies

{sft}

Evaluation loss on held-out replies: **{sft_before:.3f} before, {sft_after:.3f} after** ({sft_tokens:,} tokens, {sft_time:.0f} s).
The held-out rows are drawn from all rows, so copies of the identity chats are among them, and this loss says less about new chats.

![fine-tuning loss](from_scratch_sft.svg)

## 5. Chat

The base and the fine-tuned model answer the same questions, greedily, at most 60 tokens. {seen} of the {asked} questions are in the chats that it was trained on:

{replies}

`tunesmith chat {work}/chat` talks to it; `{work}/chat/report.html` has its curves, its data ledger and more replies.

With a GPU, `recipe:minimind-pretrain` and `recipe:minimind-sft` train MiniMind's 26-million-parameter model with its own hyper-parameters.
"""


def run(command: str, places: dict[str, str]) -> str:
    """The command's text output."""
    if not command.startswith("tunesmith "):
        subprocess.run(["sh", "-ec", command], env={**os.environ, **places}, check=True)
        return ""
    words = shlex.split(command.replace("\\\n", " "))
    for name, path in places.items():
        words = [word.replace(f"${name}", path) for word in words]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = tunesmith(words[1:])
    if code:
        raise SystemExit(f"{command}\n{output.getvalue()}")
    return output.getvalue()


@dataclass(frozen=True)
class Step:
    """A finished command.

    Attributes:
        processor_s: processor time of all threads.
        peak_kb: memory of the process at its peak, so far.
    """

    command: str
    printed: str
    seconds: float
    processor_s: float
    peak_kb: int


def run_steps(commands: dict[str, str], places: dict[str, str], kept: Path) -> dict[str, Step]:
    """Run the commands that are not in the file `kept` yet."""
    entries = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    steps = {name: Step(**entry) for name, entry in entries.items()}
    for name, command in commands.items():
        if name in steps and steps[name].command == command:
            continue
        start, processor = time.perf_counter(), time.process_time()
        printed = run(command, places)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        steps[name] = Step(command, printed, seconds, processor, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        kept.write_text(json.dumps({name: asdict(step) for name, step in steps.items()}, indent=1), encoding="utf-8")
        print(f"{name}: {seconds:.0f} s", flush=True)
    return steps


def shown(command: str, output: str, places: dict[str, str], skip: str = r"^step (?!.*(00/|eval_loss))") -> str:
    lines = [line for line in output.splitlines() if not re.match(skip, line)]
    text = "\n".join(lines)
    for name, path in places.items():
        text = text.replace(path, f"${name}")
    return f"```sh\n{command}\n```" + (f"\n\n```\n{text}\n```" if text else "")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def plot(path: Path, records: list[dict[str, Any]]) -> None:
    def series(label: str, key: str) -> Series:
        points = [(record["step"], record[key]) for record in records if key in record]
        return Series(label, [x for x, _ in points], [y for _, y in points])

    figure = str(line_chart("loss", [series("loss", "loss"), series("eval loss", "eval_loss")]))
    svg = figure[figure.index("<svg") : figure.index("</svg>")] + "</svg>"
    svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) if "xmlns" not in svg else svg
    path.write_text(svg.replace(">", ">" + STYLE, 1) + "\n", encoding="utf-8")


def commands(pretrain_flags: str, sft_flags: str) -> dict[str, str]:
    found = {
        "tokenizer": """tunesmith tokenizer --vocab-size 4096 --output $WORK/tokenizer \\
  --data $DATA/classic-books $DATA/chinese-classics $DATA/llamafactory/alpaca_zh_demo.json""",
        "pretrain": f"""tunesmith train recipe:laptop-pretrain --tokenizer $WORK/tokenizer \\
  --data $DATA/classic-books $DATA/chinese-classics --output $WORK/base {pretrain_flags}""",
        "name": f"""mkdir -p $WORK/identity
for copy in $(seq {COPIES}); do
  sed 's/{{{{name}}}}/Robin/g; s/{{{{author}}}}/Tunesmith/g' $DATA/llamafactory/identity.json > $WORK/identity/$copy.json
done""",
        "sft": f"""tunesmith train recipe:laptop-sft --model $WORK/base \\
  --data $DATA/llamafactory/alpaca_en_demo.json $DATA/llamafactory/alpaca_zh_demo.json \\
  $WORK/identity --output $WORK/chat {sft_flags}""",
    }
    return {name: command.rstrip() for name, command in found.items()}


def ask(questions: list[str], places: dict[str, str]) -> str:
    """A table of the replies of base and fine-tuned model."""
    rows = ["| question | base | fine-tuned |", "| --- | --- | --- |"]
    for question in questions:
        flags = f"--prompt {shlex.quote(question)} --temperature 0 --max-new-tokens 60"
        answers = [run(f"tunesmith chat $WORK/{name} {flags}", places).strip() for name in ("base", "chat")]
        cells = [text.replace("|", "\\|").replace("\n", "<br>") for text in (question, *answers)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def count_seen(questions: list[str], work: Path) -> int:
    """How many of the questions are in the chats of the fine-tuning, with or without their punctuation."""
    rows = [row for path in read_sources(work / "chat") for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    seen = {row["instruction"].rstrip("?.？。") for row in rows}
    return sum(question.rstrip("?.？。") in seen for question in questions)


def read_sources(run_folder: Path) -> list[str]:
    ledger = json.loads((run_folder / "data_ledger.json").read_text(encoding="utf-8"))
    return list(ledger["train"]["files"])


def describe_machine(steps: Collection[Step]) -> str:
    """Cores, time and memory; processor time tells how much of the time other programs took."""
    processor, seconds = sum(step.processor_s for step in steps), sum(step.seconds for step in steps)
    threads = torch.get_num_threads()
    shared = ", since other programs ran at the same time" if processor < 0.8 * threads * seconds else ""
    return (
        f"{threads} thread{'s' if threads > 1 else ''} on a machine of {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}, {processor / 60:.0f} minutes of processor time in {seconds / 60:.0f} minutes"
        f"{shared}, {max(step.peak_kb for step in steps) / 2**20:.1f} GiB of memory at the peak"
    )


def main(options: argparse.Namespace) -> None:
    data, work, output = options.data, options.work, options.output
    work.mkdir(parents=True, exist_ok=True)
    places = {"DATA": str(data), "WORK": str(work)}
    steps = run_steps(commands(options.pretrain_flags, options.sft_flags), places, work / "steps.json")
    said = {name: shown(step.command, step.printed, places) for name, step in steps.items()}
    questions = QUESTIONS[: options.questions]
    facts: dict[str, Any] = {"replies": ask(questions, places), "seen": count_seen(questions, work)}
    for short, name, folder in (("pre", "pretrain", "base"), ("sft", "sft", "chat")):
        records = read_metrics(work / folder)
        losses = [record["eval_loss"] for record in records if "eval_loss" in record]
        plot(output / f"from_scratch_{name}.svg", records)
        facts |= {f"{short}_before": losses[0], f"{short}_after": losses[-1], f"{short}_time": steps[name].seconds}
        facts[f"{short}_tokens"] = max(record.get("tokens", 0) for record in records)
    num_books = len([*data.glob("classic-books/*.md"), *data.glob("chinese-classics/*.txt")])
    machine = describe_machine(steps.values())
    page = PAGE.format(
        machine=machine, books=num_books, work="$WORK", copies=COPIES, asked=len(questions), **said, **facts
    )
    (output / "from_scratch.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that docs/data.md describes")
    parser.add_argument("work", type=Path, help="folder of the models; one of a run that was stopped goes on")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the page and its plots (default: docs)")
    parser.add_argument("--pretrain-flags", default="", help="more flags of the pre-training command")
    parser.add_argument("--sft-flags", default="", help="more flags of the fine-tuning command")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="how many to ask")
    main(parser.parse_args())
