"""tunesmith chat on a terminal: pasted lines are one turn, Ctrl-C ends what it should, Tab completes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
EDITOR = """
import sys, time
from tunesmith.boundary import taken_signals
from tunesmith.display import visible_streams
from tunesmith.errors import Terminated
from tunesmith.terminal.questions import Cleared, open_editor
from tunesmith.terminal.tty import held_keys, typed_ahead
commands = ["/reset", "/system ", "/exit", "/adapter \\x1b[31mred", "/adapter base"]
with visible_streams(), taken_signals(), held_keys():
    read, typed = open_editor(lambda text: [c for c in commands if c.startswith(text)]), ""
    while True:
        try:
            text = read(typed)
            typed = ""
            print(f"<{text!r}>")
            if text == "wait":
                print("working", flush=True)
                time.sleep(0.5)
                typed = typed_ahead()
        except (Cleared, KeyboardInterrupt, EOFError) as end:
            print(f"<{type(end).__name__}>")
            if isinstance(end, (EOFError, Terminated)):
                break
"""


class Terminal:
    """A process in a terminal, typed to and read from."""

    def __init__(self, words: list[str], columns: int) -> None:
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        environment |= {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            words, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )  # fmt: skip
        self.modes, self._leader, self._follower = termios.tcgetattr(follower), leader, follower
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def wait_for(self, text: str, limit_s: float = 60) -> str:
        """What is shown up to a text, which is taken from what is shown next."""
        end = time.monotonic() + limit_s
        while text not in self.plain:
            assert time.monotonic() < end, self.shown
            if select.select([self._leader], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    self.shown += os.read(self._leader, 65536).decode(errors="replace")
        found, _, self.shown = self.plain.partition(text)
        return found + text

    @property
    def plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", self.shown)

    def end(self) -> int:
        code = self.process.wait(timeout=20)
        assert termios.tcgetattr(self._follower)[3] == self.modes[3]  # it echoes again, and takes whole lines
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)
        os.close(self._follower)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: object, columns: int = 60) -> Terminal:
        opened.append(Terminal([sys.executable, *map(str, words)], columns))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def pasted(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


def test_the_line_editor(terminal: Callable[..., Terminal]) -> None:
    editor = terminal("-c", EDITOR)
    editor.wait_for("you>")
    editor.type(pasted("one\ntwo\rthree \x1b]52;c;eA==\x07\u202e"))
    editor.wait_for("three \ufffd]52;c;eA==\ufffd\ufffd")  # shown as text: the clipboard is not set
    editor.type("\r")
    editor.wait_for(r"<'one\ntwo\nthree \x1b]52;c;eA==\x07\u202e'>")
    editor.wait_for("you>")
    for keys, entered in (
        ("a\\\rb\r", "<'a\\nb'>"),
        ("a\x1b\rb\r", "<'a\\nb'>"),
        ("/r\t\r", "<'/reset'>"),
        ("/adapter b\t\r", "<'/adapter base'>"),
        ("\x1b[A\x1b[A\r", "<'/reset'>"),  # upwards through the history
        ("half\x03", "<Cleared>"),
        ("\x03", "<KeyboardInterrupt>"),
    ):
        editor.type(keys)
        editor.wait_for(entered)
        editor.wait_for("you>")
    editor.type("/\t")
    listed = editor.wait_for("/adapter base")
    listed += editor.wait_for("you>")
    for command in ("/reset", "/system", "/exit", "/adapter \\x1b[31mred"):
        assert command in listed
    editor.type("\x03")
    editor.wait_for("<Cleared>")


def test_what_is_typed_while_the_program_works_stands_at_the_next_prompt(terminal: Callable[..., Terminal]) -> None:
    editor = terminal("-c", EDITOR)
    editor.wait_for("you>")
    editor.type("wait\r")
    editor.wait_for("working")
    editor.type("early\nsecond\x1b[2J\n")
    assert "early" not in editor.wait_for("you>")
    editor.wait_for("second[2J")
    editor.type("\r")
    editor.wait_for("<'early\\nsecond[2J'>")


@pytest.mark.parametrize("end", ["\x04", signal.SIGTERM])
def test_the_terminal_is_as_before(terminal: Callable[..., Terminal], end: str | int) -> None:
    editor = terminal("-c", EDITOR)
    editor.wait_for("you>")
    if isinstance(end, str):
        editor.type(end)
    else:
        os.kill(editor.process.pid, end)
    editor.wait_for("<EOFError>" if isinstance(end, str) else "<Terminated>")
    assert editor.end() == 0


def test_the_editor_is_imported_on_a_terminal_only() -> None:
    script = "import sys, tunesmith.terminal.questions as q; assert not q.has_editor(); q.open_lines(); print(len(sys.modules)); assert 'prompt_toolkit' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, check=True)


def test_a_chat(
    run: Callable[..., tuple[int, str, str]],
    terminal: Callable[..., Terminal],
    model_folder: Path,
    chats: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", output, "--data.max_seq_len", 64,
                       "--train.micro_batch_tokens", 64, "--train.max_steps", 2)  # fmt: skip
    assert code == 0, err
    began = time.monotonic()
    chat = terminal("-m", "tunesmith", "chat", output, "--max-new-tokens", 480, "--temperature", 0)
    chat.wait_for("loading ...")
    assert time.monotonic() - began < 5  # under the load of other tests; a second where there is none
    head = chat.wait_for("you>")
    assert "Alt-Enter" in head
    assert all(len(line) <= 60 for line in head.rpartition("   ")[2].splitlines())  # behind the erased status
    chat.type(pasted("one\ntwo\nthree") + "\r")
    chat.wait_for("three\n")
    time.sleep(0.3)
    chat.type("\x03")
    found = chat.wait_for("you>")
    assert not CONTROL.search(found)
    chat.type("/res\t\r")
    chat.wait_for("(forgotten)")
    chat.wait_for("you>")
    chat.type("\x03")
    chat.wait_for("(press Ctrl-C again, or Ctrl-D, to leave)")
    chat.wait_for("you>")
    chat.type("\x03")
    assert chat.end() == 0
