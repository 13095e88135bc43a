"""On a terminal a run shows a bar; into a pipe or a file go plain lines without control characters."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tunesmith.run.console import format_rows
from tunesmith.terminal.bar import StepBar, fold

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COLUMNS = 120
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}


@pytest.fixture
def command(model_folder: Path, chats: Path, tmp_path: Path) -> list[str]:
    words = ["--model", model_folder, "--data", chats, "--output", tmp_path / "run", "--data.max_seq_len", 64,
             "--train.micro_batch_tokens", 128, "--train.max_steps", 8]  # fmt: skip
    return [sys.executable, "-m", "tunesmith", "train", *map(str, words)]


EVALUATION = ["--data.eval_split", "0.1", "--train.eval_steps", "4"]


def in_terminal(
    command: list[str],
    columns: int = COLUMNS,
    press: Callable[[str], bytes] = lambda _: b"",
    term: str = ENVIRONMENT["TERM"],
) -> tuple[int, str]:
    """Exit code, and what a terminal gets.

    Args:
        press: what is typed, once so much was shown.
    """
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": term}
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
    )  # fmt: skip
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
        if keys := press(b"".join(pieces).decode("utf-8", errors="replace")):
            os.write(leader, keys)
    os.close(leader)
    return process.wait(timeout=60), b"".join(pieces).decode("utf-8")


def uncoloured(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_a_terminal_gets_a_bar_that_ends_full(command: list[str]) -> None:
    code, shown = in_terminal([*command, "--train.log_steps", "1"])
    assert code == 0, shown
    assert shown.startswith("loading ...")  # within a second, where the machine does nothing else
    bars = [line.rstrip() for line in re.split(r"[\r\n]+", uncoloured(shown)) if line.startswith(("━", "╸", "╺"))]
    assert len(bars) >= 2
    assert max(map(len, bars)) < COLUMNS - 4  # ^C fits behind it
    steps = [int(found[1]) for bar in bars if (found := re.search(r" (\d)/8", bar))]
    assert len(steps) == len(bars)
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 8)
    assert re.search(r" 8/8  loss \d\.\d{4}  epoch \d\.\d\d/\d\.\d+  lr \d\.\d\de-\d\d  \d+ tokens/s  0:0\d", bars[-1])
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again
    assert uncoloured(shown).index("model saved: ") > uncoloured(shown).rindex(" 8/8 ")


def test_a_narrow_terminal_shows_everything_without_breaking_a_word(command: list[str]) -> None:
    code, shown = in_terminal([*command, *EVALUATION], columns=60)
    assert code == 0, shown
    lines = uncoloured(shown).replace("\r", "\n").splitlines()
    training = "\n".join(lines).partition("model saved: ")[0]
    found = re.findall(r"step (\d)/8  epoch [\d.]+/[\d.]+\s+(?:loss [\d.]+\s+lr \S+\s+\d+ tokens/s\s+)?"
                       r"eval_loss \d\.\d{4}\s+perplexity [\d.]+\s+accuracy [\d.]+%\n", training)  # fmt: skip
    assert found == ["0", "4", "8"]
    bars = [line for line in lines if line.startswith(("━", "╸", "╺"))]
    assert " 8/8  loss " in bars[-1]
    assert max(map(len, bars)) <= 55


def test_the_bar_fits_terminals_of_any_width() -> None:
    for columns in (1, 5, 10, 20, 30, 60, 200):
        console = Console(width=columns, height=10, file=io.StringIO(), force_terminal=True)
        bar = StepBar(1000, 0, console)
        bar.update(10, ["loss 1.2345", "epoch 0.01/1", "lr 1.00e-04", "1234 tokens/s"])
        [line] = console.render_lines(bar, pad=False)
        text = "".join(segment.text for segment in line)
        bar.close()
        assert len(text) <= max(1, columns - 5)
        assert text.strip().startswith("10/1000"[: max(1, columns - 5)]) or "━" in text
        assert columns < 40 or "10/1000  loss 1.2345" in text


def test_long_parts_are_folded() -> None:
    rows = "rows a.jsonl:1, b.jsonl:2, c.jsonl:3 and 12 more"
    assert fold(["step 1/2", "loss 1.5", rows], 30) == [
        "step 1/2  loss 1.5",
        "  rows a.jsonl:1, b.jsonl:2,",
        "  c.jsonl:3 and 12 more",
    ]
    assert fold(["step 1/2", "loss 1.5"], 200) == ["step 1/2  loss 1.5"]
    assert fold(["x" * 50], 10) == ["x" * 8] + ["  " + "x" * 8] * 5 + ["  xx"]
    assert fold([], 10) == []


def test_rows_are_named_by_their_file_and_number() -> None:
    rows = ["/data/very/long/chats.jsonl:12", "/data/very/long/chats.jsonl:3", "/data/b.csv:7"]
    assert format_rows(rows) == "rows chats.jsonl:12, 3, b.csv:7"
    assert format_rows(rows[:1]) == "row chats.jsonl:12"
    assert format_rows(rows * 3) == "rows chats.jsonl:12, 3, b.csv:7, chats.jsonl:12 and 5 more"
    assert format_rows([f"/x/{'n' * 99}.jsonl:123456789"]) == f"row …{'n' * 17}.jsonl:123456789"
    assert format_rows(["owner/name:train:8", "memory"]) == "rows name:train:8, memory"


def test_a_pipe_gets_lines_without_control_characters(command: list[str]) -> None:
    done = subprocess.run([*command, *EVALUATION], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not CONTROL.search(done.stdout + done.stderr)
    steps = re.findall(r"^step (\d)/8  epoch \d\.\d\d/\d(?:\.\d+)?  ", done.stdout, re.MULTILINE)
    assert steps == [str(number) for number in range(9)]
    assert "━" not in done.stdout
    assert "loading" not in done.stdout + done.stderr


def test_a_terminal_that_cannot_draw_a_bar_gets_lines(command: list[str]) -> None:
    code, shown = in_terminal(command, term="dumb")
    assert code == 0, shown
    assert re.findall(r"^step (\d)/8  epoch ", shown, re.MULTILINE) == [str(number) for number in range(1, 9)]
    assert "━" not in shown


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_says_what_happens_and_leaves_one_bar(command: list[str], tmp_path: Path, presses: int) -> None:
    """Once: the last finished step is saved. Twice: at once, with the last checkpoint named.

    Two presses may reach a busy process as one signal, so the second case also allows the message of the first.
    """
    words = [*command, "--train.max_steps", "100000", "--train.save_steps", "5", "--train.log_steps", "1"]
    pressed: list[float] = []

    def press(shown: str) -> bytes:
        if re.search(r" [1-9]\d/100000", uncoloured(shown)) and len(pressed) < presses:
            pressed.append(time.monotonic())
            return b"\x03" * presses
        return b""

    code, shown = in_terminal(words, 60, press)
    assert code == 3, shown
    screen = uncoloured(shown)
    text = " ".join(screen.split())
    assert "^C" not in screen
    if presses == 1:
        assert re.search(r"Stopping after (the current batch|a checkpoint).*; press Ctrl-C again to stop now\.", text)
        assert re.search(r"interrupted at step \d+, which is saved\. Last good checkpoint: \S+/step-\d{6}\.", text)
    else:
        assert re.search(r"interrupted at step \d+(, which is saved)?\. Last good checkpoint: \S+/step-\d{6}\.", text)
    assert f"Continue with: tunesmith resume {tmp_path / 'run'}" in text
    lines = [line.rpartition("\r")[2] for line in screen.replace("\r\n", "\n").split("\n")]  # as they stay
    assert len([line for line in lines if "━" in line]) == 1
