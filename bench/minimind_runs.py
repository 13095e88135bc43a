"""The parts `use` and `train` of minimind.py: short runs of MiniMind's scripts and of tunesmith, and what came out."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from minimind_checkout import Checkout, build, environment, log_probs, run_script, script_line, size_flags
from torch import Tensor

import tunesmith
from tunesmith.config.data_keys import FieldsSection
from tunesmith.exports.request import Export
from tunesmith.exports.run import run_export
from tunesmith.foreign.minimind import convert_command
from tunesmith.rows.conversation import Conversation, RowRefused
from tunesmith.rows.formats import parse_row
from tunesmith.sources.read import find_sources, read_rows

HIDDEN, LAYERS, MAX_SEQ_LEN, BATCH = 128, 4, 340, 16
HELD_OUT, REPLY_TOKENS = 100, 24
REQUEST_TOKENS = 160  # older servers cut the prompt to as many characters, and count it among the tokens of the answer
GREEDY = 1e-6  # as top_p: only the likeliest token is left
SERVED = """import runpy, sys, uvicorn
run, port, sys.argv = uvicorn.run, int(sys.argv[1]), sys.argv[2:]
uvicorn.run = lambda app, **options: run(app, host="127.0.0.1", port=port, log_level="warning")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """One architecture of one checkout, and the options of minimind.py."""

    checkout: Checkout
    work: Path
    options: argparse.Namespace

    @property
    def is_moe(self) -> bool:
        return bool(self.options.moe)

    def file(self, folder: Path, weight: str) -> Path:
        return folder / f"{weight}_{HIDDEN}{'_moe' if self.is_moe else ''}.pth"

    def make(self) -> Any:
        return build(self.checkout, HIDDEN, LAYERS, self.is_moe)


def write_chats(plan: Plan) -> tuple[Path, Path]:
    """Training rows and held-out rows in MiniMind's format: only turns of user and assistant, in turn."""
    rows = []
    for raw in read_rows(find_sources(plan.options.chats)):
        try:
            parsed = parse_row(raw.value, "auto", FieldsSection())
        except RowRefused:
            continue
        if not isinstance(parsed, Conversation) or parsed.tools:
            continue
        roles = [message.role for message in parsed.messages]
        if roles != ["user", "assistant"] * (len(roles) // 2) or any(m.tool_calls for m in parsed.messages):
            continue
        rows.append({"conversations": [{"role": m.role, "content": m.content} for m in parsed.messages]})
    random.Random(0).shuffle(rows)
    rows = rows[: plan.options.limit]
    if len(rows) < 2 * HELD_OUT:
        sys.exit(f"--chats: {len(rows)} rows of user and assistant; at least {2 * HELD_OUT} are needed.")
    files = plan.work / "train.jsonl", plan.work / "held_out.jsonl"
    for file, part in zip(files, (rows[HELD_OUT:], rows[:HELD_OUT]), strict=True):
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
    return files


def run_tunesmith(*words: object) -> None:
    line = [sys.executable, "-m", "tunesmith", *map(str, words)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(line[1:])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}")


def export(plan: Plan, run: Path, weight: str, output: Path) -> Path:
    shutil.rmtree(output, ignore_errors=True)
    run_export(Export(str(run), str(output), "minimind", plan.checkout.generation, weight))
    return plan.file(output, weight)


def make_start(plan: Plan) -> Path:
    """pretrain_128.pth in the checkout's out/: random weights of its class, pre-trained here for a few minutes."""
    torch.manual_seed(0)
    drawn = plan.file(plan.work, "drawn")
    torch.save(plan.make().state_dict(), drawn)
    run = plan.work / f"start-{plan.checkout.kind}{'-moe' if plan.is_moe else ''}-{plan.options.steps}"
    if (run / "checkpoints").is_dir() and not (run / "model").is_dir():
        run_tunesmith("resume", run)
    elif not (run / "model").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        run_tunesmith(
            "train", "--model", drawn, "--tokenizer", plan.checkout.tokenizer, "--data", *plan.options.text,
            "--output", run, "--data.max_seq_len", MAX_SEQ_LEN, "--train.max_steps", plan.options.steps,
            "--train.micro_batch_tokens", 4096, "--optim.lr", 2e-3, "--train.precision", "fp32",
        )  # fmt: skip
    made = export(plan, run, "pretrain", plan.work / "start")
    return Path(shutil.copy(made, plan.file(plan.checkout.out, "pretrain")))


@contextmanager
def cpu_seconds() -> Iterator[list[float]]:
    """Appends the CPU time of the commands that ran inside."""
    used: list[float] = []
    before = os.times()
    yield used
    after = os.times()
    used.append(after.children_user + after.children_system - before.children_user - before.children_system)


def sft_flags(plan: Plan, rows: Path) -> dict[str, object]:
    """For train_full_sft.py of any generation."""
    steps = math.ceil(count_lines(rows) / BATCH)
    out = "../out" if "/" in plan.checkout.trainer else "out"
    return {
        **size_flags(plan.make(), plan.is_moe), "--save_dir": out, "--out_dir": out, "--epochs": 1,
        "--batch_size": BATCH, "--learning_rate": plan.options.lr, "--max_seq_len": MAX_SEQ_LEN, "--num_workers": 0,
        "--save_interval": steps, "--log_interval": 10, "--data_path": rows, "--from_weight": "pretrain",
    }  # fmt: skip


def train_there(plan: Plan, rows: Path) -> Path:
    """Their script, on the CPU in fp32; its start is out/pretrain_128.pth."""
    run_script(plan.checkout, plan.checkout.trainer, sft_flags(plan, rows), plan.options.above)
    made = plan.file(plan.checkout.out, "full_sft")
    return Path(shutil.move(made, plan.file(plan.work, "theirs")))


def train_here(plan: Plan, start: Path, rows: Path, tokens: int) -> tuple[Path, int]:
    """A run of the file that `tunesmith convert-config` makes of their command; returns their file and the steps.

    Args:
        tokens: of a step, packed.
    """
    script = plan.checkout.trainer or "train_full_sft.py"
    words = ["python", script, *script_line(plan.checkout, script, sft_flags(plan, rows))[2:]]
    run_file, run = plan.work / "run.yaml", plan.work / f"ours-{tokens}"
    run_file.write_text(convert_command(words, here=plan.work).text, encoding="utf-8")
    shutil.rmtree(run, ignore_errors=True)
    run_tunesmith(
        "train", run_file, "--model", start, "--tokenizer", plan.checkout.tokenizer, "--data", rows, "--output", run,
        "--train.micro_batch_tokens", tokens, *shlex.split(plan.options.settings),
    )  # fmt: skip
    last = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return export(plan, run, "full_sft", plan.work / f"ours-{tokens}-pth"), json.loads(last)["step"]


def count_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def labelled(plan: Plan, start: Path, rows: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and loss mask of every row, as `tunesmith preview --json` prints them."""
    shown = tunesmith.preview(
        model=str(start), tokenizer=str(plan.checkout.tokenizer), rows=count_lines(rows),
        data={"train": str(rows), "max_seq_len": MAX_SEQ_LEN},
    )  # fmt: skip
    samples = [sample for row in shown.to_json() for sample in row["samples"]]
    return [(sample["input_ids"], sample["loss_mask"]) for sample in samples]


def held_out_loss(plan: Plan, file: Path, samples: Sequence[tuple[list[int], list[int]]]) -> float:
    """Mean loss a trained token of a .pth, by MiniMind's own class in fp32."""
    model = plan.make()
    state = torch.load(file, weights_only=True)
    model.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)
    total, count = 0.0, 0
    for ids, mask in samples:
        found: Tensor = log_probs(plan.checkout, model, torch.tensor(ids))
        for place in range(1, len(ids)):
            if mask[place]:
                total -= float(found[place - 1, ids[place]])
                count += 1
    return total / count


def compare_training(plan: Plan) -> list[list[str]]:
    rows, kept = write_chats(plan)
    start = make_start(plan)
    samples = labelled(plan, start, kept)
    steps = math.ceil(count_lines(rows) / BATCH)
    total = sum(len(ids) for ids, _ in labelled(plan, start, rows))
    trained = sum(sum(mask) for _, mask in samples)
    print(f"{count_lines(rows)} rows of {total:,} tokens; {len(samples)} rows held out, {trained:,} tokens of replies")
    table = [["weights", "steps", "tokens a step", "CPU seconds", "held-out loss", "against MiniMind's"]]
    table.append(["before", "", "", "", f"{held_out_loss(plan, start, samples):.4f}", ""])

    def theirs() -> dict[str, Any]:
        try:
            with cpu_seconds() as used:
                file = train_there(plan, rows)
        except RuntimeError as error:
            return {"failed": str(error).strip().splitlines()[-1]}
        return {"steps": steps, "seconds": used[0], "loss": held_out_loss(plan, file, samples)}

    def ours(tokens: int) -> dict[str, Any]:
        with cpu_seconds() as used:
            file, done = train_here(plan, start, rows, tokens)
        return {"steps": done, "seconds": used[0], "loss": held_out_loss(plan, file, samples)}

    wanted = kept_result(plan, "MiniMind", theirs)
    first = (
        ["did not run", "", "", wanted["failed"]]
        if "failed" in wanted
        else cells(wanted, f"{BATCH * MAX_SEQ_LEN:,}, padded")
    )
    table.append(["MiniMind", *first, ""])
    batches = {
        "as many steps": max(MAX_SEQ_LEN, math.ceil(total / steps)),
        "as many tokens a step": BATCH * MAX_SEQ_LEN,
    }
    for name, tokens in batches.items():
        found = kept_result(plan, f"tunesmith, {name}", partial(ours, tokens))
        against = f"{found['loss'] / wanted['loss'] - 1:+.2%}" if "loss" in wanted else ""
        table.append([f"tunesmith, {name}", *cells(found, f"{tokens:,}"), against])
    return table


def cells(found: Mapping[str, Any], tokens: str) -> list[str]:
    return [f"{found['steps']}", tokens, f"{found['seconds']:.0f}", f"{found['loss']:.4f}"]


def kept_result(plan: Plan, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a run with these options, from WORK/training.jsonl where it is there already."""
    options = plan.options
    settings = [options.steps, options.limit, options.lr, options.settings]
    key = json.dumps([plan.checkout.kind, plan.is_moe, *settings, name])
    file = plan.work / "training.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        if json.loads(line)["run"] == key:
            return dict(json.loads(line))
    found = run()
    if "failed" not in found:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"run": key, **found}) + "\n")
    return found


def compare_use(plan: Plan) -> list[list[str]]:
    """Answers of a model trained here, in MiniMind's scripts and here, each with the likeliest token at every place."""
    rows, _ = write_chats(plan)
    start = make_start(plan)
    run = next(iter(sorted(plan.work.glob("ours-[0-9]*[0-9]"))), None)
    if run is None:
        train_here(plan, start, rows, 2048)
        run = plan.work / "ours-2048"
    shutil.copy(export(plan, run, "full_sft", plan.work / "answers"), plan.checkout.out)
    model = tunesmith.load(run)
    table = [["script", "answers", "the same as here", "the first answer"]]

    def add(name: str, answers: list[tuple[str, str]]) -> None:
        same = 0
        for prompt, answer in answers:
            wanted = model.reply(prompt, temperature=0, max_new_tokens=REPLY_TOKENS)
            same += agrees("".join(answer.split()), "".join(wanted.split()))
        table.append([name, f"{len(answers)}", f"{same}", " ".join(answers[0][1].split())[:40] if answers else ""])

    for name, given in (("", {}), ("--load_from a Hugging Face folder", {"--load_from": copy_folder(plan, run)})):
        script = plan.checkout.chat
        if name and "--load_from" not in (plan.checkout.folder / script).read_text(encoding="utf-8"):
            continue
        try:
            add(f"{script} {name}".strip(), answers_of_chat(plan, given))
        except RuntimeError as error:
            table.append([f"{script} {name}".strip(), "0", "", f"did not run: {str(error).splitlines()[-1]}"])
    if plan.checkout.server:
        try:
            with served(plan) as port:
                # minimind-3's generate does not read max_length, which its server sets where nothing is streamed
                for stream in (True,) if plan.checkout.kind == "minimind-3" else (False, True):
                    add(f"{plan.checkout.server}{', streamed' if stream else ''}", ask_server(port, stream))
        except RuntimeError as error:
            table.append([plan.checkout.server, "0", "", f"did not run: {str(error).splitlines()[-1]}"])
    return table


def agrees(one: str, other: str) -> bool:
    """Whether two answers without white space are the same as far as both go; their limits are not the same."""
    shorter, longer = sorted((one, other), key=len)
    return bool(shorter) and longer.startswith(shorter)


def copy_folder(plan: Plan, run: Path) -> Path:
    """RUN/model under a path without the word model, which MiniMind's scripts take for a .pth."""
    folder = plan.work / "chat"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(run / "model", folder))


def use_flags(plan: Plan) -> dict[str, object]:
    return {**size_flags(plan.make(), plan.is_moe), "--weight": "full_sft", "--model_mode": 1, "--top_p": GREEDY}


def answers_of_chat(plan: Plan, given: dict[str, object]) -> list[tuple[str, str]]:
    """Prompts and answers of their chat script's own list of questions."""
    flags = {**use_flags(plan), "--max_new_tokens": REPLY_TOKENS, "--show_speed": 0, **given}
    text = (plan.checkout.folder / plan.checkout.chat).read_text(encoding="utf-8")
    if "--max_new_tokens" not in text:  # in 2024 the length of prompt and answer together
        flags["--max_seq_len"] = REQUEST_TOKENS if plan.checkout.generation == "2024" else REPLY_TOKENS
    printed = run_script(plan.checkout, plan.checkout.chat, flags, plan.options.above, given="0\n")
    answers = []
    for block in re.split("💬: |👶: ", printed)[1:]:
        prompt, _, answer = block.partition("\n")
        answers.append((prompt.strip(), re.sub("^(🧠|🤖️): ", "", answer.strip())))
    return answers


@contextmanager
def served(plan: Plan) -> Iterator[int]:
    """Their API server on a free port of this machine alone; it ends with the block."""
    above = plan.options.above
    check = [sys.executable, "-c", "import fastapi, uvicorn"]
    if subprocess.run(check, env=environment(above), capture_output=True, check=False).returncode:
        advice = "pip install --target FOLDER fastapi uvicorn, then --above FOLDER"
        raise RuntimeError(f"fastapi or uvicorn is missing ({advice})")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    line = script_line(plan.checkout, plan.checkout.server, use_flags(plan))
    line[1:1] = ["-c", SERVED, str(port)]
    log = plan.work / "server.log"
    with log.open("w") as file:
        place = (plan.checkout.folder / plan.checkout.server).parent
        server = subprocess.Popen(line, cwd=place, env=environment(above), stdout=file, stderr=file)
        try:
            wait_for(port, server, log)
            yield port
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(log.read_text()[-800:] or "the server did not start within 120 s")


def ask_server(port: int, stream: bool) -> list[tuple[str, str]]:
    prompts = ["你好", "Who are you?"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answers = []
    for prompt in prompts:
        body = {"model": "minimind", "messages": [{"role": "user", "content": prompt}], "stream": stream,
                "max_tokens": REQUEST_TOKENS, "top_p": GREEDY}  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with opener.open(request, timeout=120) as reply:
                text = reply.read().decode("utf-8")
        except OSError as error:
            raise RuntimeError(f"the server answered {error}") from None
        answers.append((prompt, read_stream(text) if stream else json.loads(text)["choices"][0]["message"]["content"]))
    return answers


def read_stream(text: str) -> str:
    found = []
    for line in text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            piece = json.loads(line.removeprefix("data: "))
            if "error" in piece:
                raise RuntimeError(f"the stream failed: {piece['error']}")
            found.append(piece["choices"][0]["delta"].get("content") or "")
    return "".join(found)
