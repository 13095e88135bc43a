"""Rows, names, templates, flags and replies reach the terminal and pages only as text."""

from __future__ import annotations

import html.parser
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import chat_row, save_folder, tiny_config, write_jsonl
from tunesmith.cards.card import load_model_lines
from tunesmith.display import shorten, to_html, to_markdown, visible
from tunesmith.run.console import print_summary

Run = Callable[..., tuple[int, str, str]]
EVIL = (
    "\x1b]52;c;ZXZpbA==\x07\x1b]8;;http:x\x1b\\\x1b[2J\rEVIL\x9b31m\u202egnp\u2066\x7f\x08<img src=x onerror=alert(1)>"
)
NAME = EVIL.replace("/", "")  # for a file or folder
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def clean(*texts: str) -> None:
    for text in texts:
        assert not CONTROL.search(text), CONTROL.findall(text)


def test_visible_shows_numbers_and_keeps_everything_else() -> None:
    assert visible("\u200e\u200f\u061c 👩\u200d🚀 क्\u200cष") == "\\u200e\\u200f\\u061c 👩\u200d🚀 क्\u200cष"
    assert visible("a\tb\n\x1b[0m\r\x9b\u202e\ud800 龘 🙂 שלום") == "a\tb\n\\x1b[0m\\r\\x9b\\u202e\\ud800 龘 🙂 שלום"
    clean(visible("".join(map(chr, range(0x110000)))))


def test_a_name_adds_no_line_to_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary([("model", "run\nmerged     proven\r\n"), ("", "x")])
    assert capsys.readouterr().out == "model  run\\nmerged     proven\\r\\n\n       x\n"


def test_long_messages_are_cut() -> None:
    assert len(shorten("x" * 10**6)) < 1100
    assert len(shorten("x\n" * 10**6)) < 4100
    assert shorten("short\nlines") == "short\nlines"


@pytest.fixture
def evil(tmp_path: Path, tokenizer: Any) -> tuple[Path, Path]:
    """A model and a data file with escape sequences in every name, key and text."""
    home = tmp_path / NAME
    model = save_folder(home / f"model{NAME}", tiny_config("qwen3"), tokenizer)
    call = {"function": {"name": EVIL, "arguments": EVIL}}
    rows: list[Any] = [
        *(chat_row(f"Q{EVIL}{n}", f"A{EVIL}{n}") for n in range(30)),
        {**chat_row("Q", "A"), EVIL: EVIL},
        {EVIL: EVIL},
        {"messages": [{"role": EVIL, "content": EVIL}]},
        {"messages": [{"role": "user", "content": "Q", EVIL: EVIL}, {"role": "assistant", "content": "A"}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {**chat_row("Q", "A"), "tools": [{"type": "function", "function": {"name": EVIL, "parameters": {EVIL: EVIL}}}]},
        {**chat_row("Q", "A"), "chat_template_kwargs": {EVIL: EVIL}},
        {**chat_row("Q\ud800", "A")},
    ]
    data = home / f"data{NAME}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / f"notes{NAME}.bin").write_bytes(b"\0")
    return model, data


def test_rows_keys_and_names(run: Run, evil: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = evil
    words = ("--model", model, "--data", data, "--data.max_refused", 1, "--data.max_seq_len", 512)
    for command in (("preview", "--rows", 50), ("check",), ("check", "--strict")):
        code, out, err = run(command[0], *words, *command[1:])
        assert "EVIL" in out or command[0] == "check", command  # its table wraps words
        clean(out, err)
    for command in ("preview", "check"):
        code, out, err = run(command, *words, "--json")
        clean(out, err)
        assert out.isascii()
        assert [json.loads(line) for line in out.splitlines()]
    output = tmp_path / f"run{NAME}"
    code, out, err = run("train", *words, "--output", output, "--train.max_steps", 2)
    assert code == 0, err
    clean(out, err)
    clean(*run("resume", output)[1:])
    clean(*run("resume", output, "--train.max_steps", 3)[1:])
    clean(*run("train", *words, "--output", output)[1:])
    clean(*run("chat", output, "--prompt", EVIL, "--max-new-tokens", 150, "--temperature", 9, "--seed", 1)[1:])
    card(output / "model" / "README.md", str(model))
    page((output / "report.html").read_text(encoding="utf-8"))


def card(path: Path, base: str) -> None:
    text = path.read_text(encoding="utf-8")
    clean(text)
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["tunesmith", "sft"],
    }  # fmt: skip
    body = body.replace(load_model_lines(is_chat=True), "")
    assert not re.search(r"(?<!\\)[<>\[\]`]", body)
    assert [line for line in body.splitlines() if line.startswith("#")][1:] == [
        "## Training data", "## Results", "## Training", "## Licence",
    ]  # fmt: skip
    assert base not in text  # a path of this machine


class Tags(html.parser.HTMLParser):
    """Counts of tags, and of attributes that run something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.runs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.runs += [name for name, _ in attrs if name.startswith("on")]


CHART_SCRIPT = resources.files("tunesmith").joinpath("pages", "chart.js").read_text(encoding="utf-8")


def page(text: str) -> None:
    clean(text)
    found = Tags()
    found.feed(text.replace(f"<script>\n{CHART_SCRIPT}\n</script>", "", 1))  # our own, the same on every page
    assert not {"img", "script", "iframe", "a", "link"} & found.seen
    assert not found.runs
    assert "EVIL" in text


@pytest.mark.parametrize("command", ["preview", "check"])
def test_pages_hold_text_only(run: Run, evil: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    model, data = evil
    rows = ["--rows", 50] if command == "preview" else []
    words = ("--model", model, "--data", data, "--html", tmp_path / "page.html", "--data.max_refused", 1, *rows)
    _, _, err = run(command, *words)
    assert (tmp_path / "page.html").is_file(), err
    page((tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "words",
    [
        ["preview", "--model", EVIL, "--data", EVIL],
        ["train", EVIL],
        [EVIL],
        ["train", f"--{EVIL.replace('=', '')}", "1"],
        ["train", "--model", "m", "--data", "d", "--output", "o", "--optim.lr", EVIL],
        ["train", "--model", "m", "--data", "d", "--output", "o", "--optim.schedule", EVIL],
        ["train", f"recipe:{EVIL}"],
        ["resume", EVIL],
        ["resume", EVIL, f"--{EVIL.replace('=', '')}", "1"],
        ["merge", EVIL, "--output", EVIL],
        ["chat", EVIL],
        ["convert-config", EVIL],
        ["tokenizer", "--data", EVIL, "--vocab-size", "300", "--output", EVIL],
    ],
)
def test_flags(run: Run, words: list[str]) -> None:
    code, out, err = run(*words)
    assert code in (1, 2)
    assert "EVIL" in out + err
    clean(out, err)


def test_run_files_and_templates(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    text = tmp_path / "run.yaml"
    for content in (
        {EVIL: 1}, {"model": {EVIL: EVIL}}, {"optim": {"lr": EVIL}}, {"data": EVIL}, {"data": {"encoding": EVIL}},
        {"model": {"path": EVIL}, "data": {"train": [EVIL]}, "train": {"output_dir": EVIL}},
    ):  # fmt: skip
        text.write_text(yaml.safe_dump(content))
        for command in ("train", "convert-config"):
            clean(*run(command, text)[1:])
    jinja = tmp_path / f"{NAME}.jinja"
    for source in (
        f"{{{{ raise_exception({EVIL!r}) }}}}",
        f"{{% {EVIL}",
        f"{{{{ x.{EVIL} }}}}",
        "{{ raise_exception(messages[0].content) }}",
    ):
        jinja.write_text(source, encoding="utf-8")
        _, out, err = run("preview", "--model", model_folder, "--data", chats, "--data.chat_template", jinja)
        assert "EVIL" in out + err or "messages[0]" in source
        clean(out, err)


def test_tokens_of_a_tokenizer(run: Run, tokenizer: Any, tmp_path: Path) -> None:
    import copy

    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"eos_token": f"<{EVIL}>"})
    own.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    model = save_folder(tmp_path / "model", tiny_config("qwen3", vocab_size=len(own)), own)
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row("Q", "A")] * 8)
    for command in (["preview"], ["check"], ["train", "--output", tmp_path / "run", "--train.max_steps", 1]):
        _, out, err = run(command[0], "--model", model, "--data", data, *command[1:])
        clean(out, err)
    assert "onerror" in (tmp_path / "run/model/README.md").read_text(encoding="utf-8")
    card(tmp_path / "run/model/README.md", str(model))


def test_adapters(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / f"run{NAME}"
    code, out, err = run("train", "--model", model_folder, "--data", chats, "--output", output, "--lora.kind", "lora", "--train.max_steps", 1)  # fmt: skip
    assert code == 0, err
    clean(out, err)
    code, out, err = run("merge", output, "--output", tmp_path / f"merged{NAME}")
    assert code == 0, err
    clean(out, err)


def in_terminal(words: list[object], answers: str = "") -> str:
    """The output on a terminal."""
    leader, follower = pty.openpty()
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-m", "tunesmith", *map(str, words)], stdin=follower, stdout=follower, stderr=follower, env=environ)  # fmt: skip
    os.close(follower)
    os.write(leader, answers.encode())
    got = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end has closed
            break
        if not piece:
            break
        got += piece
    process.wait(timeout=60)
    os.close(leader)
    return got.decode("utf-8", "replace")


OURS = re.compile(r"\r +\r|\x1b\[[0-9;]*[mKA]|\x1b\[\?25[lh]|\x1b\[\?2004[lh]\r?|\r(?=[\n\x1b])|\r\r?\n")


def test_on_a_terminal_only_our_own_colours(evil: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = evil
    words = ["--model", model, "--data", data, "--data.max_refused", 1, "--data.max_seq_len", 512]
    shown = in_terminal(["preview", *words, "--rows", 40])
    assert "\x1b[" in shown
    assert "EVIL" in shown
    clean(OURS.sub("", shown))
    shown = in_terminal(["train", *words, "--output", tmp_path / f"run{NAME}", "--train.max_steps", 2])
    assert "━" in shown
    clean(OURS.sub("", shown))


def test_markdown_and_html() -> None:
    assert to_html("<b a='x' b=\"y\">&\x1b") == "&lt;b a=&#x27;x&#x27; b=&quot;y&quot;&gt;&amp;\\x1b"
    assert to_markdown("max_seq_len [x](y) `c` <b> *e* # \n# h") == r"max_seq_len \[x\](y) \`c\` \<b\> \*e\* \# \# h"
    assert to_markdown("https://x.y www.x.y") == r"https\://x.y www\.x.y"
