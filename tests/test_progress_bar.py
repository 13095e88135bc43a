"""A run shows a progress bar on a terminal, and plain lines without control characters in a pipe or a file."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COLUMNS = 120
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}


@pytest.fixture
def command(model_folder: Path, chats: Path, tmp_path: Path) -> list[str]:
    words = ["--model", model_folder, "--data", chats, "--output", tmp_path / "run", "--data.max_seq_len", 64,
             "--train.micro_batch_tokens", 128, "--train.max_steps", 8]  # fmt: skip
    return [sys.executable, "-m", "tunesmith", "train", *map(str, words)]


EVALUATION = ["--data.eval_split", "0.1", "--train.eval_steps", "4"]


def in_terminal(command: list[str], columns: int = COLUMNS) -> tuple[int, str]:
    """Exit code, and the output on a terminal."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    pieces = []
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end has closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(leader)
    return process.wait(timeout=60), b"".join(pieces).decode("utf-8")


def uncoloured(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_a_terminal_gets_a_bar_that_ends_full(command: list[str]) -> None:
    code, shown = in_terminal(command)
    assert code == 0, shown
    bars = [line.rstrip() for line in re.split(r"[\r\n]+", uncoloured(shown)) if line.startswith("training")]
    assert len(bars) >= 2
    assert max(map(len, bars)) <= COLUMNS
    steps = [int(found[1]) for bar in bars if (found := re.search(r"━.* (\d)/8", bar))]
    assert len(steps) == len(bars)
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 8)
    assert re.search(r" 8/8 loss \d\.\d{4}  lr \d\.\d\de-\d\d  \d+ tokens/s", bars[-1])
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again
    assert shown.index("model saved: ") > shown.rindex("training")


def test_evaluations_stay_on_lines_above_the_bar(command: list[str]) -> None:
    code, shown = in_terminal([*command, *EVALUATION])
    assert code == 0, shown
    lines = re.findall(r"step (\d): [^\r\n]*eval_loss \d\.\d{4}  perplexity [\d.]+  accuracy [\d.]+%\r\n", shown)
    assert lines == ["0", "4", "8"]


def test_a_narrow_terminal_shows_the_step_beside_an_evaluation(command: list[str]) -> None:
    _, shown = in_terminal([*command, *EVALUATION], columns=80)
    bar = uncoloured(shown).partition("model saved: ")[0].splitlines()[-1]  # its final state
    assert "8/8" in bar


def test_a_pipe_gets_lines_without_control_characters(command: list[str]) -> None:
    done = subprocess.run([*command, *EVALUATION], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not CONTROL.search(done.stdout + done.stderr)
    steps = re.findall(r"^step (\d)/8  ", done.stdout, re.MULTILINE)
    assert steps == [str(number) for number in range(9)]
    assert "━" not in done.stdout
    assert "training" not in done.stdout
