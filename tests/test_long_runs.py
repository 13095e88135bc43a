"""Long runs: what is logged of each process, slow steps, profiles, a checkpoint on demand, and signals to several
processes."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import chat_row, write_jsonl
from test_pack import make_store
from tunesmith.boundary import taken_signals
from tunesmith.config.train_keys import parse_steps
from tunesmith.data.feed import Batches, Step
from tunesmith.distributed.channel import Channel
from tunesmith.monitor.pace import Pace
from tunesmith.monitor.watchdog import Peer, Watchdog
from tunesmith.training.interrupt import StopRequest

Run = Callable[..., tuple[int, str, str]]
LENGTHS = [9, 3, 21, 14, 2, 17, 6, 30, 400]


class Clock:
    """Time that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    return Clock(monkeypatch)


class Loop:
    """Steps of a given length, as the training loop reports them, under a watchdog that looks once a second."""

    def __init__(self, clock: Clock, folder: Path, peers: list[Peer] | None = None) -> None:
        self.clock, self.store, self.said = clock, make_store(folder, LENGTHS), list[str]()
        self.pace, self.step = Pace(), 0
        self.dog = Watchdog(self.pace, lambda: peers or [], "process 0", 10.0, self.said.append, clock)

    def of_step(self, *packs: list[int]) -> contextlib.AbstractContextManager[None]:
        self.step += 1
        batches = Batches(self.store, [np.array(pack) for pack in packs])
        return self.pace.of_step(self.step, Step(batches, batches, 0.0, (0, 0)))

    def make(self, seconds: float, *packs: list[int], asleep: float = 0.0) -> None:
        with self.of_step(*(packs or ([0, 1], [2]))):
            for second in range(int(seconds)):
                self.tick(1.0 + (asleep if second == 1 else 0.0))
            self.clock.now += seconds % 1

    def tick(self, seconds: float) -> None:
        self.clock.now += seconds
        self.dog.look()


def test_a_step_of_ten_times_the_usual_is_said_once(clock: Clock, tmp_path: Path) -> None:
    loop = Loop(clock, tmp_path)
    for _ in range(6):
        loop.make(2.0)
    loop.make(19.0)
    assert not loop.said
    loop.make(300.0)
    [text] = loop.said
    assert "step 8 " in text
    assert "20 s" in text
    assert "10 times the usual 2.0 s" in text
    assert "forward 1 of its 2" in text
    assert "rows x.jsonl:1, 2" in text
    loop.make(300.0)  # ten minutes have not passed
    assert len(loop.said) == 1


@pytest.mark.parametrize(
    "case", ["first steps", "short steps", "longer packs", "longer documents", "between", "asleep"]
)
def test_what_is_slow_by_design_is_not_said(clock: Clock, tmp_path: Path, case: str) -> None:
    loop = Loop(clock, tmp_path)
    if case == "first steps":
        for seconds in (1.0, 60.0, 60.0, 1.0, 60.0):
            loop.make(seconds)
        assert not loop.said
        return
    for _ in range(20):
        loop.make(0.1 if case == "short steps" else 2.0)
    if case == "short steps":
        loop.make(9.0)
    elif case == "longer packs":
        loop.make(60.0, *[[2]] * 8)  # five times the tokens
    elif case == "longer documents":
        loop.make(90.0, [8])
    elif case == "between":
        for _ in range(100):  # an evaluation, a save
            loop.tick(1.0)
    else:
        loop.make(15.0, asleep=4000.0)
    assert not loop.said


def test_the_process_that_is_behind_is_named(clock: Clock, tmp_path: Path) -> None:
    peers = [
        Peer("process 1", (7, 1, 0), "in forward 1 of its 2 of step 7: row b.jsonl:9", 40.0),
        Peer("process 2", (7, 2, 1), "after forward 2 of its 2 of step 7", 0.3),
    ]
    loop = Loop(clock, tmp_path, peers)
    for _ in range(6):
        loop.make(1.0)
    with loop.of_step([0], [1]):
        loop.pace.wait()
        loop.pace.count_forward()
        for _ in range(12):
            loop.tick(1.0)
    [text] = loop.said
    assert "process 1 has given no sign of life for 40 s; it was in forward 1 of its 2 of step 7: row b.jsonl:9" in text
    assert "process 0" not in text
    assert "process 2" not in text


def test_steps_to_profile() -> None:
    assert (parse_steps("10-12"), parse_steps("10"), parse_steps(" 3 - 3 ")) == ((10, 12), (10, 10), (3, 3))
    for wrong in ("", "0", "5-2", "1-2-3", "a-b", "-3", "1-", "1.5", "²"):
        with pytest.raises(ValueError):
            parse_steps(wrong)


FAST = ["--train.max_steps", 4, "--data.max_seq_len", 64, "--train.micro_batch_tokens", 64, "--lora.kind", "lora",
        "--lora.dropout", 0.2, "--lora.rank", 2]  # fmt: skip


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "chats.jsonl", [chat_row(f"say {n}", f"the answer is {n}") for n in range(60)])


def test_a_profile_changes_no_weight(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    words = ["train", "--model", model_folder, "--data", chats, *FAST]
    assert run(*words, "--output", tmp_path / "plain")[0] == 0
    code, out, err = run(*words, "--output", tmp_path / "run", "--train.profile_steps", "2-3")
    assert code == 0, err
    trace = tmp_path / "run" / "profile" / "steps-2-3.process-0.json.gz"
    assert str(trace) in out
    assert "profile of steps 2-3" in out
    assert "calls  operation" in out
    assert [path.name for path in trace.parent.iterdir()] == [trace.name]
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("mm" in str(name) for name in names)
    ours, others = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "plain"))
    assert ours.read_bytes() == others.read_bytes()
    # a resumed run may take or leave it, and a range that the run ends in is written up to there
    code, _, err = run("resume", tmp_path / "run", "--train.max_steps", 6, "--train.profile_steps", "6-99",
                       "--allow", "schedule")  # fmt: skip
    assert code == 0, err
    assert (trace.parent / "steps-6.process-0.json.gz").exists()


def test_memory_of_the_process_is_logged(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    code, _, err = run("train", "--model", model_folder, "--data", chats, *FAST, "--output", tmp_path / "run")
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.05 < record["memory_gb"] < 500 for record in records if "loss" in record)
    assert not any("process_memory_gb" in record for record in records)


def test_a_signal_for_a_checkpoint_ends_nothing() -> None:
    with taken_signals(saves=True):
        os.kill(os.getpid(), signal.SIGUSR1)  # while libraries are imported
        time.sleep(0.1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)  # before the loop can save
        stop.defer()
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
        assert stop.wants_save
        assert not stop.is_made
        os.kill(os.getpid(), signal.SIGTERM)  # still the first of these
        time.sleep(0.3)
        assert stop.is_made
        assert not stop.is_urgent
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with StopRequest() as stop:  # of a caller
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.3)
        assert seen == [signal.SIGUSR1]
        assert not stop.wants_save
    finally:
        signal.signal(signal.SIGUSR1, before)


class Store(dict[str, bytes]):
    """The launcher's key-value store, in this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def compare_set(self, key: str, _: str, value: str) -> None:
        self.setdefault(key, value.encode())


def test_a_process_that_slept_declares_nobody_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_SILENCE_S", "100")
    channel = Channel(Store(), 0, 2, "process 0 of 2")
    channel.close()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 5000.0)  # a suspended machine: nobody gave a sign
    channel._forgive_sleep()
    assert channel._silent() is None
    monkeypatch.setattr(time, "monotonic", lambda: now + 5000.6)
    channel._forgive_sleep()
    assert channel._silent() is None


class Launched:
    """A command in two processes under torchrun; its output is read line by line."""

    def __init__(self, *words: object) -> None:
        script = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "tunesmith",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.agent = subprocess.Popen(
            [*script, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.agent.stdout is not None
        for line in self.agent.stdout:
            self.lines.append(line.rstrip())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 100.0) -> None:
        end = time.time() + seconds
        while not re.search(pattern, self.text):
            is_over = time.time() > end or self.agent.poll() is not None
            assert not is_over, f"no {pattern!r}:\n{self.text}"
            time.sleep(0.05)

    def workers(self) -> dict[int, int]:
        """Rank -> process id."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.agent.pid:
                    entries = (folder / "environ").read_text().split("\0")
                    found |= {int(entry[5:]): int(folder.name) for entry in entries if entry.startswith("RANK=")}
            except (OSError, ValueError, IndexError):
                continue
        return found

    def end(self, seconds: float = 60.0) -> list[int]:
        """Wait for the end; exit codes of the processes, as torchrun lists them."""
        self.agent.wait(seconds)
        self._reader.join(10)
        return [int(code) for code in re.findall(r"exitcode  : (-?\d+)", self.text)]

    def kill(self) -> None:
        for number in self.workers().values():
            with_suppressed_kill(number)
        self.agent.kill()


def with_suppressed_kill(number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


@pytest.fixture
def launch() -> Iterator[Callable[..., Launched]]:
    launched: list[Launched] = []

    def start(*words: object) -> Launched:
        launched.append(Launched(*words))
        return launched[-1]

    yield start
    for each in launched:
        if each.agent.poll() is None:
            each.kill()


needs_long = pytest.mark.skipif(not os.environ.get("TUNESMITH_LONG"), reason="a minute; TUNESMITH_LONG=1 runs it")
LONGER = ["--data.max_seq_len", 64, "--train.micro_batch_tokens", 64, "--train.grad_accum_steps", 4,
          "--optim.schedule", "constant", "--train.max_steps", 300]  # fmt: skip


@needs_long
def test_signals_to_several_processes(
    run: Run, launch: Callable[..., Launched], model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    """A checkpoint on demand, a signal to one process, one to torchrun, and the weights of a run without any."""
    words = ["--model", model_folder, "--data", chats, *LONGER]
    first = launch("train", *words, "--output", tmp_path / "run")
    first.wait_for("attention  ")
    for number in first.workers().values():
        os.kill(number, signal.SIGUSR1)  # training begins just now
    first.wait_for(r"checkpoint saved: \S*step-0000")
    first.wait_for(r"step [2-9]\d/300")
    os.kill(first.workers()[1], signal.SIGUSR1)
    first.wait_for(r"(?s)checkpoint saved.*checkpoint saved")
    os.kill(first.workers()[1], signal.SIGTERM)
    assert first.end() == [3, 3]
    assert len(re.findall("interrupted at step", first.text)) == 1
    assert len(re.findall(r"process 1 of 2 .*got a signal\. Stopping", first.text)) <= 1
    assert "Error" not in first.text.partition("interrupted at step")[0]

    second = launch("resume", tmp_path / "run")
    second.wait_for(r"step \d+/300")
    second.agent.send_signal(signal.SIGINT)
    second.end()
    assert second.text.count("interrupted at step") == 1
    assert second.text.count("Stopping") == 1

    third = launch("resume", tmp_path / "run")
    third.wait_for(r"step \d+/300")
    for _ in range(2):
        os.kill(third.workers()[1], signal.SIGTERM)
        time.sleep(0.05)
    third.end()
    assert third.agent.returncode == 1
    assert re.search("Continue with.*: tunesmith resume", third.text)

    last, whole = launch("resume", tmp_path / "run"), launch("train", *words, "--output", tmp_path / "whole")
    assert (last.end(200), whole.end(200)) == ([], [])
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(len(record["process_memory_gb"]) == len(record["process_tokens_per_s"]) == 2 for record in records)
    ours, others = (tmp_path / name / "model" / "model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == others.read_bytes()


@needs_long
def test_a_process_that_stops_is_named(
    launch: Callable[..., Launched], model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First for a while, then for good."""
    monkeypatch.setenv("TUNESMITH_SILENCE_S", "30")
    words = ["--model", model_folder, "--data", chats, *LONGER, "--train.max_steps", 2000]
    run = launch("train", *words, "--output", tmp_path / "run")
    run.wait_for(r"step [1-9]\d\d/2000")
    os.kill(run.workers()[1], signal.SIGSTOP)
    run.wait_for(r"warning: step \d+ has taken 1\d s, \d+ times the usual .*; process 1 has given no sign of life for")
    assert "process 0 is" not in run.text
    os.kill(run.workers()[1], signal.SIGCONT)
    steps = len(re.findall(r"step \d+/2000", run.text))
    run.wait_for(rf"(?s)(step \d+/2000.*){{{steps + 1}}}")
    os.kill(run.workers()[1], signal.SIGSTOP)
    run.wait_for(r"error: process 1 of 2 .* has not answered for 30 seconds\. It was .* step \d+")
    os.kill(run.workers()[1], signal.SIGCONT)
    assert 4 in run.end()
    assert run.text.count("error: process 1") == 1


@needs_long
@pytest.mark.parametrize("moment", ["attention  ", r"step 1/300"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_at_other_moments(
    launch: Callable[..., Launched], model_folder: Path, chats: Path, tmp_path: Path, moment: str, rank: int
) -> None:
    run = launch("train", "--model", model_folder, "--data", chats, *LONGER, "--output", tmp_path / "run")
    run.wait_for(moment)
    began = time.time()
    os.kill(run.workers()[rank], signal.SIGINT)
    assert run.end() == [3, 3]
    assert time.time() - began < 12
    lines = [line for line in run.lines if "interrupted" in line]
    assert len(lines) == 1, run.text
    assert not re.search(r"error: |tunesmith/.*\.py", run.text)
