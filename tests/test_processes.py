"""Several processes under torchrun: the steps of one, and one message however they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from conftest import WORDS, chat_row, save_folder, tiny_config, write_jsonl
from test_pack import make_store
from tunesmith.distributed.meeting import NotMetError, meet

HERE = Path(__file__).parent
IS_LONG = bool(os.environ.get("TUNESMITH_LONG"))
only_long = pytest.mark.skipif(not IS_LONG, reason="takes minutes; set TUNESMITH_LONG=1")
LENGTHS = [9, 3, 21, 14, 2, 17, 6, 30, 11, 8, 19, 40, 5, 13, 7, 7, 22]
CHAT_STEPS = ("--data.max_seq_len", "64", "--train.micro_batch_tokens", "128", "--train.grad_accum_steps", "3")


@dataclass(frozen=True)
class Ended:
    """A launch that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def messages(self) -> list[str]:
        """The lines of ours on standard error."""
        return [line for line in self.err.splitlines() if line.startswith(("error:", "interrupted"))]


def torchrun(processes: int, *words: object, limit_s: float = 100, restarts: int = 0, **variables: str) -> Ended:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--max-restarts", str(restarts), *map(str, words),
    ]  # fmt: skip
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | variables
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s, check=False)
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


# --- the mathematics


@pytest.mark.parametrize("processes", [2, *([1, 3, 4] if IS_LONG else [])])
def test_steps_of_several_processes_equal_those_of_one(tmp_path: Path, processes: int) -> None:
    """Gradients, losses and weights in float64: ddp and fsdp, full and LoRA, dense and MoE, packed and not, dropout."""
    make_store(tmp_path, LENGTHS)
    ended = torchrun(processes, HERE / "gradients_of_processes.py", tmp_path / "tokens", limit_s=280)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out.splitlines()[-1])
    assert len(found) >= 26
    assert {case: errors for case, errors in found.items() if max(errors) > 1e-10} == {}


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    """Models with dropout, and chats of many lengths."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    save_folder(tmp_path / "gpt2", tiny_config("gpt2", initializer_range=0.02, **dropout), tokenizer)
    save_folder(tmp_path / "qwen3_moe", tiny_config("qwen3_moe", initializer_range=0.02), tokenizer)
    words = WORDS.split()
    rows = [
        chat_row(" ".join(words[i % 7 : i % 7 + 1 + i % 11]), " ".join(words[i % 5 : i % 5 + 2 + i % 17]))
        for i in range(120)
    ]
    write_jsonl(tmp_path / "chats.jsonl", rows)
    return tmp_path


def train_words(folder: Path, run: str, model: str = "gpt2", *more: object) -> list[object]:
    return ["train", "--model", folder / model, "--data", folder / "chats.jsonl", "--output", folder / run,
            "--optim.lr", "1e-3", *CHAT_STEPS, *more]  # fmt: skip


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@only_long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["none", "lora"])
@pytest.mark.parametrize("model", ["gpt2", "qwen3_moe"])
def test_losses_do_not_depend_on_the_number_of_processes(folder: Path, parallel: str, kind: str, model: str) -> None:
    """50 steps in 1 to 4 processes, and 25 in one number of processes continued in another."""
    flags = ["--lora.kind", kind, "--optim.schedule", "constant", "--optim.warmup_ratio", 0, "--train.max_steps"]
    alone = subprocess.run(
        [sys.executable, "-m", "tunesmith", *map(str, train_words(folder, "1", model, *flags, 50))], check=False
    )
    assert alone.returncode == 0
    wanted = losses(folder / "1")
    assert len(wanted) == 50

    def check(run: str) -> None:
        found = losses(folder / run)
        assert len(found) == 50
        assert max(abs(one - other) for one, other in zip(found, wanted, strict=True)) < 1e-6

    for processes in (2, 3, 4):
        words = train_words(folder, str(processes), model, *flags, 50, "--train.parallel", parallel)
        ended = torchrun(processes, "-m", "tunesmith", *words)
        assert ended.code == 0, ended.err
        check(str(processes))
    for first, then in ((2, 3), (3, 2)):
        run = f"{first} then {then}"
        words = train_words(folder, run, model, *flags, 25, "--train.parallel", parallel)
        more = ["resume", folder / run, "--train.max_steps", 50]
        for processes, command in ((first, words), (then, more)):
            ended = torchrun(processes, "-m", "tunesmith", *command)
            assert ended.code == 0, ended.err
        check(run)


# --- ends


def nothing_half_written(folder: Path, run: str) -> None:
    """No staging folder is left, and a run that has begun can be opened."""
    assert not list(folder.glob(f".{run}.*"))
    if (folder / run).exists():
        assert (folder / run / "run.json").exists()
        json.loads((folder / run / "data_ledger.json").read_text())


def test_a_wrong_flag_is_told_once(folder: Path) -> None:
    ended = torchrun(2, "-m", "tunesmith", *train_words(folder, "run"), "--trian.seed", 3)
    assert ended.code == 1
    assert ended.err.count("--trian.seed") == 1
    assert len(ended.messages) == 1
    assert "exitcode  : 2" in ended.err  # torchrun may have ended the other before it said so
    assert not (folder / "run").exists()


FAULTS = {
    "killed": ("kill", 1, 6, "process 1 of 2"),
    "process 0 killed": ("kill", 0, 6, "process 0 of 2"),
    "killed while process 0 prepares": ("kill", 1, ".run.*.partial", "process 1 of 2"),
    "process 0 killed while others wait": ("kill", 0, ".run.*.partial", "process 0 of 2"),
    "out of memory": ("memory", 1, 6, "process 1 of 2"),
    "process 0 out of memory": ("memory", 0, 6, "out of memory"),
    "no room": ("file", 0, 6, "checkpoint"),
    "not finite": ("nan", 1, 6, "step 7"),
    "unexpected error": ("raise", 1, 6, "process 1 of 2"),
    "stopped": ("stop", 1, 6, "process 1 of 2"),
    "process 0 stopped": ("stop", 0, 6, "process 0 of 2"),
}


@only_long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", FAULTS)
def test_what_ends_one_process_ends_all_with_one_message(folder: Path, name: str, parallel: str) -> None:
    what, rank, when, fact = FAULTS[name]
    moment = when if isinstance(when, int) else folder / when
    words = train_words(
        folder, "run", "gpt2", "--train.max_steps", 40, "--train.save_steps", 4, "--train.parallel", parallel
    )
    ended = torchrun(2, HERE / "faulty_process.py", what, rank, moment, *words, TUNESMITH_SILENCE_S="5")
    assert ended.code == 1
    [message] = ended.messages
    assert fact in message
    assert "process-" not in message
    if isinstance(when, int):
        assert "step-000004" in message
        assert "tunesmith resume" in message
        assert "exitcode  : 4" in ended.err
    assert ended.seconds < 90  # torchrun itself waits 30 seconds for a process that is stopped
    if what != "kill" or isinstance(when, int):
        nothing_half_written(folder, "run")
    again = torchrun(2, "-m", "tunesmith", *words, "--train.resume", "true")
    assert again.code == 0, again.err
    assert not list(folder.glob(".run.*"))


@only_long
def test_damaged_data_are_told_once(folder: Path) -> None:
    (folder / "chats.jsonl").write_text('{"messages": [{"role": "user"\n')
    ended = torchrun(2, "-m", "tunesmith", *train_words(folder, "run"))
    assert len(ended.messages) == 1
    assert "chats.jsonl:1" in ended.messages[0]
    assert ended.err.count("exitcode  : 1") >= 1
    assert not (folder / "run").exists()
    nothing_half_written(folder, "run")


@only_long
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_started_again_continue_to_the_same_weights(folder: Path, rank: int) -> None:
    """torchrun's --max-restarts, without a flag of ours."""
    words = ["--train.max_steps", 16, "--train.save_steps", 4]
    for run, what in (("alone", "none"), ("killed", "kill")):
        command = train_words(folder, run, "gpt2", *words)
        ended = torchrun(2, HERE / "faulty_process.py", what, rank, 6, *command, restarts=2)
        assert ended.code == 0, ended.err
    weights = [(folder / run / "model" / "model.safetensors").read_bytes() for run in ("alone", "killed")]
    assert weights[0] == weights[1]
    assert losses(folder / "killed") == losses(folder / "alone")


def test_processes_of_a_new_start_do_not_meet_those_of_an_earlier_one() -> None:
    """torchrun keeps its store between starts; a process that was killed while it waited has left its word there."""
    store = HashStore()
    store.set("hello/1", "of a process that is gone")

    def begin() -> list[str]:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda rank: meet(store, rank, 3, 20.0), range(3)))

    first, second = begin(), begin()
    assert len(set(first)) == len(set(second)) == 1
    assert first != second


def test_a_process_that_does_not_come_is_named() -> None:
    store = HashStore()
    store.set("hello/1", "of a process that is gone")
    with pytest.raises(NotMetError, match="process 1 "):
        meet(store, 0, 2, 0.2)
